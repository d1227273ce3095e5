"""What each process of the DDP test does; a module of its own, so that spawned ones find it."""

import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from processes import start_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import memtile

IDS = torch.tensor([[0, 22, 5, 2], [7, 7, 11, 3]])


class Net(nn.Module):
    """An embedding tied with its head, and linears between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(23, 12)
        self.up, self.down = nn.Linear(12, 31), nn.Linear(31, 12)
        self.head = nn.Linear(12, 23, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        """The mean square of the logits."""
        x = self.embedding(ids)
        loss: Tensor = self.head(x + self.down(torch.tanh(self.up(x)))).square().mean()
        return loss


def train(model: nn.Module, ids: list[Tensor]) -> None:
    """A few steps of SGD, a batch for each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in ids:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()


class Mlps(nn.Module):
    """Two MLPs without their intermediate activations, one after another."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlps = nn.ModuleList(
            memtile.TiledMLP(
                *(memtile.TiledLinear(12, 31, out_splits=4) for _ in range(2)),
                memtile.TiledLinear(31, 12, in_splits=4),
                block_rows=2,
            )
            for _ in range(2)
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        """A mean square."""
        for mlp in self.mlps:
            x = x + mlp(x)
        return x.square().mean()


def rows(*ranks: int) -> list[Tensor]:
    """Batches of three steps, 5 rows for each rank."""
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(2, 5, 12, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [each[list(ranks)].flatten(0, 1) for each in steps]


def run(rank: int, folder: str, of_mlps: bool) -> None:
    """Train a tiled model on this rank's half of each batch and save what came out."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    model = Mlps() if of_mlps else memtile.tile(Net(), out_splits=3, in_splits=2)
    batches = rows(rank) if of_mlps else [IDS[rank : rank + 1]] * 3
    train(DistributedDataParallel(model), batches)
    torch.save(memtile.untile(model).state_dict(), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def spawn(of_mlps: bool = False) -> list[dict[str, Tensor]]:
    """What the two ranks ended with."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(run, 2, folder, of_mlps)
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]
