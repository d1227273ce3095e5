"""Mixtures of experts, trained where their tiles live: equal to plain transformers at each save."""

import copy
from itertools import pairwise

import pytest
import torch
from small_experts import VOCABULARY, experts_model
from small_training import MODES

import memtile
from memtile import DiskHome, TileOptimizer
from memtile.homes import streamed_allocation
from memtile.optim import dense_parameters

LENGTH = 6
FIELDS = ("read_bytes", "written_bytes")


def _loss(model, number):
    """The loss of a short sequence, of few different tokens, so that experts are left out."""
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(3, VOCABULARY, (2,), generator=generator)
    ids = words[torch.randint(0, 2, (1, LENGTH), generator=generator)]
    return model(input_ids=ids, labels=ids).loss


def _train(model, optimizer, schedule, numbers):
    """So many steps; gives how many of the parameters had no gradient."""
    idle = 0
    for number in numbers:
        _loss(model, number).backward()
        idle += sum(parameter.grad is None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return idle


def _state(model, optimizer):
    """The entries of a dense state by the names of parameters."""
    state = optimizer.state_dict()["state"]
    names = [dense.name for dense in dense_parameters(model)]
    return {
        f"{names[number]}: {key}": value
        for number, entry in state.items()
        for key, value in entry.items()
    }


@pytest.mark.parametrize(
    ("name", "tile_bytes", "saves"),
    [
        ("qwen3", 24 * 28 * 8, (10, 30, 50)),
        ("qwen3", 24 * 20 * 8, (3, 9)),
        ("gpt-oss", 24 * 72 * 8, (3, 9)),
    ],
)
def test_steps_equal_dense_at_every_save(name, tile_bytes, saves):
    """With parts of experts and with one in a tile: values and state within 1e-6 of dense AdamW."""
    dense = experts_model(name, num_hidden_layers=1).double()
    model = memtile.tile(copy.deepcopy(dense), max_tile_bytes=tile_bytes, home=DiskHome())
    options = {"lr": 3e-3, "weight_decay": 0.1}
    ours = TileOptimizer(model, torch.optim.AdamW, **options)
    plain = torch.optim.AdamW(dense.parameters(), **options)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, 30) for each in (ours, plain)]
    for first, last in pairwise((0, *saves)):
        assert _train(model, ours, schedules[0], range(first, last)) > last - first
        _train(dense, plain, schedules[1], range(first, last))

        values = dict(memtile.dense_state_dict(model)), dense.state_dict()
        for mine, theirs in (values, (_state(model, ours), _state(dense, plain))):
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                assert (mine[key] - value).abs().max() <= 1e-6 * value.abs().max(), key


@pytest.mark.usefixtures("in_slabs")
@pytest.mark.parametrize("mode", MODES)
def test_a_step_moves_only_experts_that_are_hit(mode):
    """What a step of the optimizer reads and writes is the weights and moments of what it steps."""
    home = DiskHome()
    model = memtile.tile(experts_model("qwen3"), max_tile_bytes=24 * 28 * 4, home=home)
    optimizer = TileOptimizer(model, torch.optim.AdamW, mode=mode)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    _train(model, optimizer, schedule, range(3))
    for number in range(3, 6):
        loss = _loss(model, number)
        forward = home.traffic
        loss.backward()
        backward = home.traffic
        parked = [p for p in model.parameters() if streamed_allocation(p)]
        hit = [p for p in parked if p.grad is not None or p in optimizer._stepped]
        room = sum(streamed_allocation(parameter).room for parameter in hit)
        optimizer.step()
        optimizer.zero_grad()

        assert len(hit) < len(parked)
        step = home.traffic
        written = room if mode == "classic" else 3 * room
        assert backward.written_bytes - forward.written_bytes == written
        moved = (4 * room, 3 * room) if mode == "classic" else (0, 0)
        read, written = (getattr(step, key) - getattr(backward, key) for key in FIELDS)
        assert (read, written) == moved
