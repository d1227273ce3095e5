"""While a tile is stepped the next one is read and the last one is written: shown by events."""

import threading
import time

import pytest
import torch
from faulty_disk import Watched, slabs_are_free
from small_training import optimizer_for, same, values

from memtile import DiskHome, TiledLinear
from memtile.homes import allocation_of, disk_io
from memtile.transfer import Holder, rings_of

TILES = 5
PATIENCE = 60  # seconds until a test that would hang fails instead


class Gate:
    """Holds writes of one tile back, and knows which tiles' reads and writes have begun."""

    def __init__(self, monkeypatch, layer):
        self.allocations = [allocation_of(tile.weight) for _, tile in layer.tiles()]
        self.begun = {
            act: [threading.Event() for _ in self.allocations] for act in ("read", "write")
        }
        self.opened, self.held, self.written = threading.Event(), None, []
        for act in self.begun:
            real = getattr(disk_io, f"{act}_at")
            monkeypatch.setattr(disk_io, f"{act}_at", self._seen(act, real))

    def _seen(self, act, real):
        def move(fd, buffer, offset):
            tile = self._tile_at(offset)
            if tile is not None:
                self.begun[act][tile].set()
            if act == "write" and tile is not None and tile == self.held:
                assert self.opened.wait(PATIENCE)
            moved = real(fd, buffer, offset)
            if act == "write":
                self.written.append(tile)
            return moved

        return move

    def _tile_at(self, offset):
        for number, allocation in enumerate(self.allocations):
            if allocation.offset <= offset < allocation.offset + allocation.room:
                return number
        return None


@pytest.fixture
def layer():
    """A layer on disk with an optimizer after one step, and gradients at home for the next."""
    torch.manual_seed(4)
    layer = TiledLinear(7, 23, bias=False, out_splits=TILES, home=DiskHome())
    optimizer = optimizer_for(layer, Watched, lr=0.01)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        layer(torch.linspace(-1, 1, 21).view(3, 7)).square().sum().backward()
    return layer, optimizer


def _watch(monkeypatch, act):
    """Call `act` with the number of each tile that is about to be stepped."""
    numbers = iter(range(1 << 30))
    monkeypatch.setattr(Watched, "before", staticmethod(lambda parameter: act(next(numbers))))


def test_the_next_tile_is_being_read(layer, monkeypatch):
    """While no write is pending, the next tile's read begins before a tile's step does."""
    model, optimizer = layer
    gate, seen = Gate(monkeypatch, model), []
    ring = rings_of(model.linears[0][0].home).steps

    def act(number):
        following = gate.begun["read"][number + 1 : number + 2]
        seen.append(all(event.wait(PATIENCE) for event in following))
        while Holder.WRITERS in ring.holders:
            time.sleep(0.001)

    _watch(monkeypatch, act)
    optimizer.step()

    assert seen == [True] * TILES


@pytest.mark.parametrize("held", [0, 2, TILES - 2])
def test_a_step_does_not_wait_for_the_last_write(layer, monkeypatch, held):
    """A tile is stepped while the one before it is still being written."""
    model, optimizer = layer
    gate, seen = Gate(monkeypatch, model), []
    gate.held = held

    def act(number):
        if number == held + 1:
            begun = gate.begun["write"][held].wait(PATIENCE)
            seen.append(begun and held not in gate.written)
            gate.opened.set()

    _watch(monkeypatch, act)
    optimizer.step()

    assert seen == [True]
    assert sorted(n for n in gate.written if n is not None) == list(range(TILES))
    assert slabs_are_free(model.linears[0][0].home)


def test_step_returns_when_all_is_written(layer, monkeypatch):
    """The last write is held back: `step()` returns only after it, with every tile at home."""
    model, optimizer = layer
    gate, done = Gate(monkeypatch, model), threading.Event()
    gate.held = TILES - 1

    def run():
        optimizer.step()
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert gate.begun["write"][gate.held].wait(PATIENCE)
    early = done.is_set()
    gate.opened.set()
    thread.join(PATIENCE)

    assert not early
    assert done.is_set()
    assert gate.written.count(gate.held) == 1


def test_no_more_is_read_than_is_stepped(layer):
    """A step reads each value, gradient and moment once, and writes all but gradients once."""
    model, optimizer = layer
    home = model.linears[0][0].home
    rooms = [allocation_of(tile.weight).room for _, tile in model.tiles()]
    before = home.traffic

    optimizer.step()

    assert home.traffic.read_bytes - before.read_bytes == 4 * sum(rooms)
    assert home.traffic.written_bytes - before.written_bytes == 3 * sum(rooms)


def test_slow_writes_change_no_bits(layer, monkeypatch):
    """Whether writes are delayed or not, the weights are those of plain torch."""
    model, optimizer = layer
    references = [torch.nn.Parameter(tile.weight.detach().clone()) for _, tile in model.tiles()]
    plain = torch.optim.AdamW(references, lr=0.01)
    for reference, (_, tile) in zip(references, model.tiles(), strict=True):
        reference.grad = tile.weight.grad.clone()
        state = optimizer.state[tile.weight]
        plain.state[reference] = {key: entry.clone() for key, entry in state.items()}
    gate = Gate(monkeypatch, model)
    gate.held = 1
    _watch(monkeypatch, lambda number: gate.opened.set() if number == 2 else None)

    optimizer.step()
    plain.step()

    assert same(values(model), {"weight": torch.cat(references).detach()})
