"""What each process of the DDP test does; a module of its own, so that spawned ones find it."""

import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from processes import start_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import memtile
from memtile.layers import DeferredLogits, deferring_head

COMPUTING = ("unused, logits", "static, logits", "static, both", "static, both, of logits")
"""Kinds in which DDP needs the graph of the logits that the model gives; others compute none."""
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


class Writer(Net):
    """The same, trained for the next token, of which rank 1 has few."""

    LABELS: Final = torch.tensor([[22, 5, 2, 9], [-100, 11, -100, -100]])
    share: float = 1.0  # of the ranks' mean
    gives: str = "loss"  # or "logits", or "both"
    of_logits: bool = False  # whether the loss that is used is another one, of the logits

    def forward(self, ids: Tensor) -> Any:
        """This rank's part of the mean over the tokens of all ranks, or what it is made of."""
        x = self.embedding(ids)
        logits = self.head(x + self.down(torch.tanh(self.up(x))))
        if self.gives == "logits":
            return {"logits": logits}
        loss = self.loss(logits, ids)
        # cast after the loss, as accelerate does
        return loss if self.gives == "loss" else {"loss": loss, "logits": logits.double()}

    def loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        """That part, of the logits of these."""
        labels = self.LABELS[(ids[:, :1] == IDS[:, 0]).nonzero()[:, 1]]
        flat = logits.view(-1, logits.size(-1)), labels.flatten()
        loss = nn.functional.cross_entropy(*flat, reduction="sum")
        return loss / (self.LABELS >= 0).sum() / self.share


def train(model: nn.Module, ids: list[Tensor]) -> None:
    """A few steps of SGD, a batch for each."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in ids:
        optimizer.zero_grad()
        found: Any = model(batch)
        if isinstance(found, dict):
            loss = None if model.module.of_logits else found.get("loss", None)
            found = loss or model.module.loss(found["logits"], batch)
        found.backward()
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


def run(rank: int, folder: str, kind: str) -> None:
    """Train a tiled model on this rank's half of each batch and save what came out.

    The kind says what DDP looks at, and what the model gives.
    """
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(Path(folder) / "store"), 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    model, batches = _of(kind, rank)
    looks = {"find_unused_parameters": "unused" in kind, "static_graph": "static" in kind}
    parallel = DistributedDataParallel(model, **looks)
    train(parallel, batches)
    torch.save(memtile.untile(model).state_dict(), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def _of(kind: str, rank: int) -> tuple[nn.Module, list[Tensor]]:
    if kind == "mlps":
        return Mlps(), rows(rank)
    model = memtile.tile(Net() if kind == "plain" else Writer(), out_splits=3, in_splits=2)
    if isinstance(model, Writer):
        model.share = 1 / 2
        deferring_head.LEAST_LOGITS = 0
        if kind not in COMPUTING:
            DeferredLogits.computed = None
        if "," in kind:
            model.gives, model.of_logits = kind.split(", ")[1], "of logits" in kind
        memtile.defer_logits(model.head)
    return model, [IDS[rank : rank + 1]] * 3


def spawn(kind: str) -> list[dict[str, Tensor]]:
    """What the two ranks ended with."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(run, 2, folder, kind)
        return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(2)]
