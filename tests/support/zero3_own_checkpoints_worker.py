"""What processes under ZeRO-3 save by DeepSpeed's own `save_checkpoint`, and resume from it."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_cases import STEPS, Case, batches, share_of, tiled
from processes import start_ranks
from torch import Tensor
from zero3_group import join
from zero3_worker import started

import memtile
from memtile.engines.deepspeed_zero3 import attach, config

HALF = STEPS // 2
WORLD, OTHER = 2, 1
CASES = {
    "rows, tied, clipped": Case(clip=0.05),
    "ragged": Case(grid=(3, 5)),
    "frozen tiles": Case(grid=(3, 5), frozen=True),
    "offloaded": Case(offload=True),
}
ELSEWHERE = ("rows, tied, clipped", "ragged", "frozen tiles")
"""Resumed at another world size too."""
GRID = (2, 2)
"""Another one, for what reads the files by itself."""
_UNIVERSAL = {"checkpoint": {"load_universal": True}}


def engine_of(case: Case, seed: int = 0, **keys: Any) -> Any:
    """DeepSpeed's engine, whose values are others for each seed."""
    model = tiled(case, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=seed / 10)
    place = "cpu" if case.offload else None
    given = config(model, clip=case.clip, offload_param=place, offload_optimizer=place)
    return attach(started(model, {**given, **keys}))


def train(engine: Any, first: int, last: int) -> None:
    """The steps from `first` on, on this rank's part of each batch."""
    for batch in batches()[first:last]:
        engine.backward(engine(share_of(batch, dist.get_rank(), dist.get_world_size())))
        engine.step()


def ended(engine: Any) -> dict[str, Tensor]:
    """The dense parameters; the engine is of no use afterwards."""
    state = {name: tensor.clone() for name, tensor in memtile.dense_state_dict(engine.module)}
    engine.destroy()
    return state


def resumed(folder: Path, case: Case, seed: int = 1, **keys: Any) -> dict[str, Tensor]:
    """Another model, which goes on where the checkpoint ends."""
    engine = engine_of(case, seed, **keys)
    engine.load_checkpoint(str(folder))
    train(engine, HALF, STEPS)
    return ended(engine)


def save_and_resume(rank: int, world: int, folder: str) -> None:
    """Each case: trained without a break, and in two halves."""
    join(rank, world, folder)
    for name, case in CASES.items():
        place = Path(folder) / name
        engine = engine_of(case)
        train(engine, 0, HALF)
        engine.save_checkpoint(str(place), tag="half")
        half = {name: tensor.clone() for name, tensor in memtile.dense_state_dict(engine.module)}
        train(engine, HALF, STEPS)
        states = {"half": half, "whole": ended(engine), "resumed": resumed(place, case)}
        states["consolidated"] = consolidated(place, case)
        torch.save(states, place / f"states{rank}.pt")
    dist.destroy_process_group()


def consolidated(folder: Path, case: Case) -> dict[str, Tensor]:
    """What DeepSpeed's own script makes of the files, read by tiles of another grid."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = tiled(replace(case, grid=GRID), torch.float32)
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(str(folder)))
    return dict(memtile.dense_state_dict(model))


def resume_elsewhere(rank: int, world: int, folder: str) -> None:
    """At another world size: from the files as they are, and from universal ones."""
    join(rank, world, folder)
    told, states = {}, {}
    for name in ELSEWHERE:
        place, case = Path(folder) / name, CASES[name]
        try:
            resumed(place, case)
        except Exception as error:  # DeepSpeed's own, and torch's where a frozen tile comes first
            told[name] = str(error)
        states[name] = resumed(place / "universal", case, seed=int(not case.frozen), **_UNIVERSAL)
    torch.save(states, Path(folder) / f"elsewhere{rank}.pt")
    (Path(folder) / f"told{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def spawn(folder: Path) -> dict[str, list[dict[str, dict[str, Tensor]]]]:
    """What each rank has in each case, after half and after all steps."""
    start_ranks(save_and_resume, WORLD, WORLD, str(folder))
    ranks = range(WORLD)
    return {name: [torch.load(folder / name / f"states{r}.pt") for r in ranks] for name in CASES}


def spawn_elsewhere(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """What rank 0 of the other world has, and what it was told about the files as they are."""
    for name in ELSEWHERE:
        made = folder / name / "universal"
        _to_universal(folder / name / "half", made / "half")
    start_ranks(resume_elsewhere, OTHER, OTHER, str(folder))
    told = json.loads((folder / "told0.json").read_text())
    return torch.load(folder / "elsewhere0.pt"), told


def _to_universal(source: Path, target: Path) -> None:
    script = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", str(source), "--output_folder", str(target)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run(
        [*script, *folders, *workers], env=environment, check=True, capture_output=True, timeout=300
    )
