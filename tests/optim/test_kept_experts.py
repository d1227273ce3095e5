"""Experts that train in memory between steps: the bits of those at home, with less traffic."""

import gc

import pytest
import torch
from routed_layers import (
    EXPERTS,
    dense_routed,
    routed,
    routed_values,
    scheduled_optimizer,
    state_of,
    steps_of,
    tiles_of,
    train_routed,
)

from memtile import DiskHome, HostHome, TileOptimizer, dense_state_dict
from memtile.errors import HomeIOError
from memtile.homes import PAGE, allocation_of, is_parked
from memtile.optim import kept_experts

TILE = 3 * PAGE  # a weight and AdamW's two moments, a page each


def made(kept_tiles=0, mode="in_backward", tile=TILE, **options):
    """A model on disk, of whose tiles so many may be in memory, its optimizer and schedule."""
    home = DiskHome()
    home.kept_bytes = int(kept_tiles * tile)
    model = routed(home)
    return home, model, *scheduled_optimizer(model, mode=mode, **options)


def turning(count):
    """Steps whose tokens turn from one expert to the next; all are hit in the first."""
    for number, (x, _) in enumerate(steps_of(count)):
        yield x, [number // 6 % EXPERTS] if number else range(EXPERTS)


def in_memory(model):
    """Which experts are in memory now."""
    homes = [allocation_of(tile).home for tile in tiles_of(model)]
    return {number for number, home in enumerate(homes) if isinstance(home, HostHome)}


@pytest.mark.parametrize("mode", ["classic", "in_backward"])
@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.1}, {"fused": True}, {"amsgrad": True}, {"idle": "skip"}],
    ids=lambda options: next(iter(options)),
)
def test_bits_are_those_of_experts_that_stay_on_disk(mode, options):
    """Over 30 steps with a schedule: values and state at every tenth, whatever moved meanwhile."""
    kept_bytes = TILE + PAGE * (mode == "classic") + PAGE * ("amsgrad" in options)
    plain, kept = made(0, mode, **options), made(1, mode, kept_bytes, **options)
    moved = set()
    steps = list(turning(30))
    for number in range(0, 30, 10):
        for _, model, optimizer, schedule in (plain, kept):
            for step in steps[number : number + 10]:
                train_routed(model, optimizer, [step], [schedule])
                moved |= in_memory(model)
        ours, theirs = routed_values(kept[1]), routed_values(plain[1])
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        if "idle" in options:
            continue  # there is no dense state of it
        ours, theirs = state_of(kept[2]), state_of(plain[2])
        pairs = [(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in theirs]
        assert all(torch.equal(*pair) for pair in pairs)
    assert in_memory(plain[1]) == set()
    assert len(moved) > 2  # some moved in the place of others


def test_an_expert_in_memory_moves_no_bytes():
    """Once the one that all tokens hit is in memory, steps read and write nothing at home."""
    home, model, optimizer, _ = made(1)
    x, _ = next(steps_of(1))
    train_routed(model, optimizer, [(x, [3])] * 3)
    before = home.traffic

    train_routed(model, optimizer, [(x, [3])] * 5)

    assert in_memory(model) == {3}
    assert home.traffic == before


def test_one_hit_moves_nothing():
    """An expert that was hit once stays at home: to move it would not pay."""
    _, model, optimizer, _ = made(5)
    x, _ = next(steps_of(1))

    train_routed(model, optimizer, [(x, [0]), (x, [1]), (x, [2])])

    assert in_memory(model) == set()


@pytest.mark.parametrize(("mode", "rooms"), [("classic", 4), ("in_backward", 3)])
def test_memory_is_at_most_what_the_home_allows(mode, rooms):
    """Also where a tile more would nearly fit; in classic mode gradients count."""
    _, model, optimizer, schedule = made(2.99, mode, rooms * PAGE)

    for step in steps_of(20):
        train_routed(model, optimizer, [step], [schedule])
        assert len(in_memory(model)) <= 2
        assert optimizer._kept.nbytes == len(in_memory(model)) * rooms * PAGE
    assert len(in_memory(model)) == 2


def test_what_is_used_more_takes_the_place_of_what_is_used_less():
    """When tokens turn to other experts, those move in, and the former are right at home."""
    _, model, optimizer, _ = made(1)
    x, _ = next(steps_of(1))

    train_routed(model, optimizer, [(x, [0])] * 5)
    assert in_memory(model) == {0}
    train_routed(model, optimizer, [(x, [1])] * 25)

    assert in_memory(model) == {1}
    plain = made(0)
    train_routed(plain[1], plain[2], [(x, [0])] * 5 + [(x, [1])] * 25)
    ours, theirs = routed_values(model), routed_values(plain[1])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_nothing_goes_home_for_a_tile_that_would_not_fit():
    """One that is used more and needs the room of two, of which one is used as much, waits."""
    _, model, optimizer, _ = made(2)
    x, _ = next(steps_of(1))
    train_routed(model, optimizer, [(x, [0, 1])] * 5)
    assert in_memory(model) == {0, 1}
    kept, (first, second, *_) = optimizer._kept, tiles_of(model)
    home = kept._kept[first][kept_experts.VALUE][0].home

    assert not kept._make_room(home, 2 * TILE, kept._score(first) + 0.5)
    kept._uses[first] = 0.0, kept._step
    assert not kept._make_room(home, 2 * TILE, kept._score(second) + 0.5)
    assert in_memory(model) == {0, 1}
    assert kept._make_room(home, TILE, kept._score(second) + 0.5)
    assert in_memory(model) == {1}


def test_the_same_is_resumed(tmp_path):
    """State saved while some are in memory goes on in another model, with others in memory."""
    steps = list(steps_of(24))
    _, whole, optimizer, schedule = made(0)
    train_routed(whole, optimizer, steps, [schedule])
    _, first, optimizer, schedule = made(2)
    train_routed(first, optimizer, steps[:12], [schedule])
    torch.save(
        (dict(dense_state_dict(first)), optimizer.state_dict(), schedule.state_dict()),
        tmp_path / "run",
    )

    _, second, optimizer, schedule = made(1)
    values, state, times = torch.load(tmp_path / "run")
    second.load_state_dict(values)
    optimizer.load_state_dict(state)
    schedule.load_state_dict(times)
    train_routed(second, optimizer, steps[12:], [schedule])

    ours, theirs = routed_values(second), routed_values(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_others_write_is_trained_on():
    """`load_state_dict`, `.data` and in-place writes reach a tile in memory, and stay."""
    pair = [made(kept) for kept in (0, 1)]
    x, _ = next(steps_of(1))
    for _, model, optimizer, _ in pair:
        train_routed(model, optimizer, [(x, [0])] * 3)
        model.load_state_dict(dense_routed().state_dict())
        tiles_of(model)[0].data.mul_(2)
        train_routed(model, optimizer, [(x, [0])] * 2 + [(x, [1])] * 25)
    assert in_memory(pair[1][1]) == {1}  # the first was written home

    ours, theirs = routed_values(pair[1][1]), routed_values(pair[0][1])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_all_go_home_with_the_optimizer():
    """Then the home has its allowance again, for the next optimizer."""
    home, model, optimizer, _ = made(2)
    x, _ = next(steps_of(1))
    train_routed(model, optimizer, [(x, [0, 1])] * 3)
    assert home.kept_bytes == 0
    before = routed_values(model)

    del optimizer, _
    gc.collect()

    assert home.kept_bytes == 2 * TILE
    assert in_memory(model) == set()
    assert all(is_parked(tile) for tile in tiles_of(model))
    assert all(torch.equal(value, before[name]) for name, value in routed_values(model).items())
    optimizer = TileOptimizer(model, torch.optim.AdamW, mode="in_backward")
    train_routed(model, optimizer, [(x, [0])] * 3)
    assert in_memory(model) == {0}


def test_a_tile_that_cannot_be_written_stays_in_memory(monkeypatch):
    """The step is whole and raises nothing; values are right, and it moves later."""
    _, model, optimizer, _ = made(1)
    x, _ = next(steps_of(1))
    train_routed(model, optimizer, [(x, [0])] * 5)

    def fail(*_):
        raise HomeIOError(5, "no")

    with monkeypatch.context() as patch:
        patch.setattr(kept_experts, "write_values", fail)
        train_routed(model, optimizer, [(x, [1])] * 25)
        assert in_memory(model) == {0}
    train_routed(model, optimizer, [(x, [1])])

    assert in_memory(model) == {1}
    plain = made(0)
    train_routed(plain[1], plain[2], [(x, [0])] * 5 + [(x, [1])] * 26)
    ours, theirs = routed_values(model), routed_values(plain[1])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
