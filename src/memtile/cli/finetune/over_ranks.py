"""A run over ranks: each process holds a shard of every tile and trains on sequences of its own."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from memtile.checkpoints.steps import saved_steps
from memtile.cli import models
from memtile.cli.finetune.launching import is_first_rank
from memtile.cli.finetune.log import Entry
from memtile.cli.finetune.loop import (
    TRAINING,
    Report,
    Result,
    Run,
    first_missing,
    nothing_left_of_a_failed_start,
    train,
)
from memtile.cli.finetune.run import check_dtype, check_vocabulary, texts_of
from memtile.cli.finetune.sequences import Heard
from memtile.cli.finetune.settings import Settings
from memtile.cli.finetune.sharding import load_engine, sharded
from memtile.engines import dense_files, distributed_checkpoints
from memtile.engines.ranks import Ranks, check_agreement
from memtile.homes import keep_freed_memory_out, usable_folder
from memtile.planning import format_byte_size
from memtile.testing import PeakMemory


@dataclass(frozen=True)
class RankOptions:
    """How a run over ranks is carried out.

    Args:
        out: its folder, which all ranks see.
        tile_bytes: the most that a tile has.
        offload: keep shards, gradients and moments in host memory.
        save_every: steps between checkpoints.
        resume: go on from the last one.
        strict: refuse a folder that holds more than the model has.
        trusts_code: whether code of the model's folder may run.
    """

    out: Path
    tile_bytes: int
    offload: bool
    save_every: int
    resume: bool
    strict: bool = False
    trusts_code: bool = False


def finetune_over_ranks(
    settings: Settings,
    options: RankOptions,
    heard: Heard,
    planned: Callable[[str], None],
    started: Callable[[int], None],
    report: Report,
) -> Result:
    """Trains, saves, and writes the fine-tuned folder at the end; each rank calls it.

    Args:
        settings: what to train.
        options: how.
        heard: called as the texts are read.
        planned: called with a sentence on what each rank holds.
        started: called with the number of steps that were done before.
        report: called after each step, on the first rank.

    Raises:
        CommandError: something given cannot be trained on or with, or the loss is not finite.
        EngineError: a rank is gone, or ranks differ.
        CheckpointError: the model's or the run's checkpoint is damaged.
        Interrupted: a signal came to one of the ranks; the run is saved.
    """
    load_engine(settings.engine or "")
    keep_freed_memory_out()
    made = first_missing(options.out)
    with (
        PeakMemory() as memory,
        _process_group() as ranks,
        ranks.missing_none(),
        nothing_left_of_a_failed_start(options.out, made, options.resume or not is_first_rank()),
    ):
        run = _ShardedRun(settings, options, memory, heard)
        planned(run.summary)
        if options.resume:
            run.resume()
        else:
            ranks.first(lambda: _begin(settings, options.out))
        started(run.done)
        result = train(run, report)
        run.write_folder()
    return result


def _begin(settings: Settings, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    settings.write(out)


@contextmanager
def _process_group() -> Iterator[Ranks]:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    yield Ranks()
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


class _ShardedRun(Run):
    """A model whose tiles are shards, and one sequence for each rank in each step."""

    def __init__(
        self, settings: Settings, options: RankOptions, memory: PeakMemory, heard: Heard
    ) -> None:
        super().__init__(settings, options.out, options.save_every, memory)
        torch.manual_seed(settings.seed)
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self.writes = self._rank == 0
        model = models.empty_of(Path(settings.model), options.trusts_code)
        if settings.engine != "zero3":  # which scales the loss
            check_dtype(model)
        _, self._sequences = texts_of(settings, usable_folder(None), heard, options.trusts_code)
        check_vocabulary(model, self._sequences)
        models.check_length(model, settings.tokens, f"--tokens {settings.tokens}")
        nbytes = 4 * sum(parameter.numel() for parameter in model.parameters())
        check_agreement(model, (settings, options))
        with models.told():
            self._sharded = sharded(
                model,
                settings,
                options.tile_bytes,
                offload=options.offload,
                strict=options.strict,
            )
        self._seen = 0  # sequences that all ranks have trained on
        self.summary = (
            f"{settings.engine}, {self._ranks} ranks, tiles of at most "
            f"{format_byte_size(options.tile_bytes)}; weights, gradients and moments in float32: "
            f"{format_byte_size(4 * nbytes // self._ranks)} a rank"
        )

    def resume(self) -> None:
        if not Ranks().first(self.has_saved):
            return
        found = distributed_checkpoints.load(
            self.out / TRAINING, self._sharded.model, self._sharded.optimizer
        )
        self.done, self._seen = found.step, found.position["sequences"]
        self._sharded.scheduler.load_state_dict(found.extra)

    def has_saved(self) -> bool:
        return bool(saved_steps(self.out / TRAINING))

    def step(self) -> Entry:
        started, lr = time.perf_counter(), float(self._sharded.scheduler.get_last_lr()[0])
        ids = self._sequences.at(self._seen + self._rank).to(self._sharded.device)
        loss = self._sharded.loss(ids)
        mean = self._mean(float(loss.detach()))
        self.check_finite(mean)
        self._sharded.update(loss)
        self.done += 1
        self._seen += self._ranks
        seconds = time.perf_counter() - started
        speed = self.settings.tokens * self._ranks / seconds
        return Entry(self.done, mean, lr, seconds, speed, self._largest(self.memory.nbytes))

    def is_to_stop(self, asked: bool) -> bool:
        """Whether any rank was asked to: a checkpoint takes them all."""
        return self._largest(int(asked)) > 0

    def save(self) -> None:
        distributed_checkpoints.save(
            self.out / TRAINING,
            self._sharded.model,
            self._sharded.optimizer,
            step=self.done,
            position={"sequences": self._seen},
            extra=self._sharded.scheduler.state_dict(),
        )

    def write_folder(self) -> None:
        self._sharded.model.eval()
        dense_files.save_checkpoint(self._sharded.model, self.out, dtype=self._sharded.saved_dtype)
        if self.writes:
            models.carry_tokenizer(Path(self.settings.model), self.out)

    def _mean(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total) / self._ranks

    def _largest(self, value: int) -> int:
        most = torch.tensor(value)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)
