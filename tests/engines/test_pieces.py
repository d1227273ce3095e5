"""The pieces that a rank holds of a tensor: rectangles that together are its shard."""

import errno
import os
import warnings

import pytest
import torch
import torch.distributed.checkpoint
from dcp_worker import Net
from dcp_zero3_worker import spawn_zero3
from torch import nn

from memtile.engines import dcp_files
from memtile.engines.dcp_files import read_alone
from memtile.engines.dense_views import _in_stack, boxes
from memtile.engines.distributed_checkpoints import load, save
from memtile.geometry import Grid


@pytest.mark.parametrize("shape", [(7,), (1, 1), (3, 5), (5, 1), (2, 3, 4), (1, 4, 1, 3)])
def test_the_boxes_of_a_stretch_are_its_elements_in_order(shape):
    """For every stretch of a flattened tensor; at most 2·dimensions - 1 boxes."""
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel()):
        for stop in range(start, whole.numel() + 1):
            found = list(boxes(shape, start, stop))
            parts = [whole[inside(*box)].flatten() for box in found]

            assert torch.cat([torch.arange(0), *parts]).tolist() == list(range(start, stop))
            assert len(found) <= 2 * len(shape) - 1


def test_a_number_is_one_box():
    """A tensor of no dimensions has one element."""
    assert list(boxes((), 0, 1)) == [((), ())]
    assert list(boxes((), 1, 1)) == []


@pytest.mark.parametrize("splits", [1, 2, 7, 30])
@pytest.mark.parametrize("columns", [slice(0, 4), slice(1, 3)])
def test_tiles_of_a_stack_are_boxes_of_it(splits, columns):
    """Rows of the matrix of all experts, wherever they begin and end, also some columns of them."""
    stack = torch.arange(5 * 6 * 4).view(5, 6, 4)
    out = torch.full_like(stack, -1)
    for span in Grid.split_stack(5, 6, 4, splits).out_spans:
        for start in (span.start, span.start + span.size // 2):  # two shards of each tile
            stop = span.stop if start > span.start or span.size == 1 else start + span.size // 2
            values = stack.flatten(0, 1)[start:stop, columns]
            for offset, part in _in_stack(stack.shape, (start, columns.start), values):
                out[inside(offset, part.shape)] = part

    assert torch.equal(out[..., columns], stack[..., columns])


@pytest.mark.slow
def test_zero_3_saves_and_loads_dense_names(tmp_path):
    """A plain model loads what its ranks save; what they load survives the optimizer's step."""
    pytest.importorskip("deepspeed")
    plain, trained = Net().float(), Net().float()
    with torch.no_grad():
        for number, parameter in enumerate(trained.parameters()):
            parameter.add_(number)
    save(tmp_path / "alone", trained, step=1)
    states, told = spawn_zero3(tmp_path)
    load(tmp_path / "run", plain)

    for rank in states:
        assert_same(plain, rank["saved"])
        assert_same(trained, rank["loaded"])
        assert_same(trained, rank["stepped"])
    assert all("memtile.resume_training" in undone for undone in told)


def inside(offset, sizes):
    return tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))


def assert_same(model: nn.Module, found: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, found[name]), name


def test_a_folder_on_a_filesystem_without_maps_is_read(tmp_path, monkeypatch):
    """Where a file of DCP cannot be mapped (ENODEV on some network disks), torch reads it."""
    truth, found = torch.randn(7, 5), torch.zeros(7, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.distributed.checkpoint.save({"a": truth}, checkpoint_id=tmp_path, no_dist=True)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(dcp_files.mmap, "mmap", refuse)
    read_alone({"a": found}, tmp_path)

    assert torch.equal(found, truth)
