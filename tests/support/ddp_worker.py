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


def run(rank: int, folder: str) -> None:
    """Train a tiled model on this rank's half of each batch and save what came out."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    model = memtile.tile(Net(), out_splits=3, in_splits=2)
    parallel = DistributedDataParallel(model)
    train(parallel, [IDS[rank : rank + 1]] * 3)
    torch.save(memtile.untile(model).state_dict(), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def spawn() -> list[dict[str, Tensor]]:
    """What the two ranks ended with."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(run, 2, folder)
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]
