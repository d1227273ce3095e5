"""An iteration concerns the homes that it visits: models with homes of their own do not meet."""

import threading

import torch
from torch import nn

import memtile
from memtile.homes import PAGE, disk_io

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


def _model(folder):
    """Twelve tiles of equal size in a home of their own, and the home."""
    torch.manual_seed(1)
    home = memtile.DiskHome(folder)
    layers = [nn.Linear(32, 32, bias=False) for _ in range(3)]
    return memtile.tile(nn.Sequential(*layers), out_splits=4, home=home), home


def _forward(model):
    return model(X).square().mean()


def test_two_models_in_turn_read_what_each_reads_alone(tmp_path):
    """Forwards of two models, and then their backwards: no slab of the other is emptied."""
    (first, home), (second, other) = _model(tmp_path), _model(tmp_path)
    read = []
    for alone in (True, True, False, False):  # the first of each learns the order
        before = home.traffic.read_bytes + other.traffic.read_bytes
        if alone:
            for model in (first, second):
                _forward(model).backward()
        else:
            losses = [_forward(model) for model in (first, second)]
            for loss in losses:
                loss.backward()
        read.append(home.traffic.read_bytes + other.traffic.read_bytes - before)

    assert read[3] == read[1]


def test_a_model_does_not_wait_for_the_writes_of_another(tmp_path, monkeypatch):
    """While a gradient of one model cannot be written, the other one runs forward and backward."""
    (first, _), (second, _) = _model(tmp_path), _model(tmp_path)
    written, real, fd = threading.Event(), disk_io.write_at, second[0].tile(0, 0).home._fd

    def write_at(descriptor, buffer, offset):
        if descriptor != fd:
            written.wait()
        return real(descriptor, buffer, offset)

    monkeypatch.setattr(disk_io, "write_at", write_at)
    stuck = threading.Thread(target=lambda: _forward(first).backward())
    late = threading.Timer(5, written.set)  # so that a wait fails, and does not hang
    stuck.start()
    late.start()
    try:
        _forward(second).backward()
        assert not written.is_set()
    finally:
        late.cancel()
        written.set()
        stuck.join(20)
    assert not stuck.is_alive()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one.grad, two.grad) for one, two in pairs)


def test_a_model_inside_another_is_part_of_its_iteration(tmp_path):
    """A tiled model that is called by a tiled model reads no tile again for that."""
    inner, home = _model(tmp_path)
    outer = memtile.tile(nn.Sequential(inner, nn.Linear(32, 32)), out_splits=2, home=home)
    read = []
    for _ in range(3):
        before = home.traffic.read_bytes
        with torch.no_grad():
            outer(X)
        read.append(home.traffic.read_bytes - before)

    assert read[2] == 14 * PAGE  # each tile has a page
