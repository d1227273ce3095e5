"""Memory measurement: what it counts, and where it refuses."""

from pathlib import Path

import pytest
import torch
from torch import nn

import memtile.testing.memory as memory
from memtile.errors import MemtileError, UnsupportedPlatformError
from memtile.testing import LargestAllocation, PeakMemory, peak_allocated_bytes

MIB = 1024 * 1024
# Resident memory is counted by the kernel, page by page and per processor, and the interpreter
# allocates too; 4 MiB either way is ample beside the 64 MiB that these tests move.
SLACK = 4 * MIB


def touched(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB, dtype=torch.uint8)


def test_peak_memory_counts_what_was_freed_again():
    """A buffer that lives only inside the block is in its peak."""
    with PeakMemory() as peak:
        touched(64)

    assert abs(peak.nbytes - 64 * MIB) < SLACK


def test_peak_memory_does_not_count_what_was_there():
    """A buffer that was there on entry, and a peak from before, are not in it."""
    kept = touched(64)
    touched(128)
    with PeakMemory() as peak:
        touched(32)

    assert kept.numel() == 64 * MIB
    assert abs(peak.nbytes - 32 * MIB) < SLACK


def test_peak_memory_can_be_read_on_the_way():
    """Inside the block `nbytes` is the peak so far, and after it nothing is added."""
    with PeakMemory() as peak:
        touched(32)
        early = peak.nbytes
        touched(96)
    total = peak.nbytes
    touched(160)

    assert abs(early - 32 * MIB) < SLACK
    assert abs(total - 96 * MIB) < SLACK
    assert peak.nbytes == total


def test_an_inner_measurement_does_not_make_the_outer_one_forget():
    """Nested blocks each report their own peak, though the kernel keeps only one count."""
    with PeakMemory() as outer:
        touched(96)
        with PeakMemory() as inner:
            touched(32)

    assert abs(outer.nbytes - 96 * MIB) < SLACK
    assert abs(inner.nbytes - 32 * MIB) < SLACK


def test_peak_memory_ends_with_an_exception():
    """After an exception in the block the number stands and a new block starts from nothing."""
    peak = PeakMemory()
    with pytest.raises(ZeroDivisionError), peak:
        touched(64).numel() // 0
    with PeakMemory() as fresh:
        pass

    assert abs(peak.nbytes - 64 * MIB) < SLACK
    assert fresh.nbytes < SLACK


@pytest.mark.parametrize(("platform", "name"), [("win32", "Windows"), ("darwin", "Darwin")])
def test_other_systems_are_refused_by_name(monkeypatch, platform, name):
    """Off Linux the refusal is ours and an OSError, and says which system this is."""
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.platform, "system", lambda: name)

    with pytest.raises(
        UnsupportedPlatformError, match=f"this is {name}: run it on Linux"
    ) as raised:
        PeakMemory().__enter__()
    assert isinstance(raised.value, MemtileError)
    assert isinstance(raised.value, OSError)


def test_a_closed_proc_is_refused(monkeypatch, tmp_path):
    """Where the kernel's count cannot be reset, it says which file refuses and why."""
    closed = tmp_path / "absent" / "clear_refs"
    monkeypatch.setattr(memory, "_CLEAR_REFS", closed)

    with pytest.raises(UnsupportedPlatformError, match="No such file") as raised:
        PeakMemory.ensure_measurable()
    assert str(closed) in str(raised.value)


def test_a_kernel_without_the_count_is_refused(monkeypatch, tmp_path):
    """A status file without the field is refused, never read as zero."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t  12 kB\n")
    monkeypatch.setattr(memory, "_STATUS", Path(status))

    with pytest.raises(UnsupportedPlatformError, match="no VmHWM"):
        memory._status_bytes("VmHWM")
    assert memory._status_bytes("VmRSS") == 12 * 1024


def test_the_largest_allocation_is_named():
    """Size and operation of the largest result are kept, whatever comes after it."""
    left, right = torch.ones(30, 70), torch.ones(70, 50)
    with LargestAllocation() as largest:
        left @ right
        left + 1
        right.sum()

    assert (largest.nbytes, largest.op) == (30 * 70 * 4, "aten.add")


def test_views_and_operations_in_place_allocate_nothing():
    """What an argument already owned is not an allocation, however it is looked at."""
    owned = torch.ones(1000, 10)
    with LargestAllocation() as largest:
        owned.t()[3:].mul_(2).add_(1)
        owned.view(-1).detach()

    assert (largest.nbytes, largest.op) == (0, "")


def test_a_view_counts_for_the_storage_behind_it():
    """A small view of a new result counts as that result's whole storage."""
    with LargestAllocation() as largest:
        torch.zeros(1000, 10)[0]

    assert largest.nbytes == 1000 * 10 * 4


def test_an_out_argument_that_grows_is_an_allocation():
    """An operation that has to make its `out=` larger has allocated it."""
    out = torch.empty(0)
    with LargestAllocation() as largest:
        torch.add(torch.ones(64), torch.ones(64), out=out)

    assert largest.nbytes >= 64 * 4


def test_backward_and_the_optimizer_are_seen():
    """Gradients and optimizer state are allocations too, and are among the largest here."""
    layer = nn.Linear(40, 60, bias=False)
    inputs = torch.ones(2, 40)
    with LargestAllocation() as backward:
        layer(inputs).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    with LargestAllocation() as step:
        optimizer.step()

    assert (backward.nbytes, backward.op) == (40 * 60 * 4, "aten.mm")
    assert step.nbytes == 40 * 60 * 4


def test_the_meta_device_holds_nothing():
    """Tensors without memory are not counted."""
    with LargestAllocation() as largest:
        torch.ones(1 << 20, device="meta") + 1

    assert largest.nbytes == 0


class Wrapped(torch.Tensor):
    """A tensor subclass that keeps a plain tensor inside and has no memory of its own."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapped.inner = inner
        return wrapped

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = (arg.inner if isinstance(arg, cls) else arg for arg in args)
        return cls(func(*plain, **(kwargs or {})))


def test_what_a_tensor_subclass_does_inside_is_seen():
    """An operation on a subclass counts by the plain operations that it turns into."""
    wrapped = Wrapped(torch.ones(20, 30))
    with LargestAllocation() as largest:
        wrapped + 1

    assert (largest.nbytes, largest.op) == (20 * 30 * 4, "aten.add")


def test_the_peak_counts_what_is_held_at_once():
    """Two tensors held together count together, a freed one does not."""

    def hold() -> torch.Tensor:
        torch.empty(1000)
        one = torch.empty(300)
        return torch.cat([one, torch.empty(200)])

    assert peak_allocated_bytes(hold) >= 4 * 1000
    assert peak_allocated_bytes(hold) < 4 * 1000 + 4 * 200


def test_nothing_allocated_is_zero():
    """A function that allocates nothing has no peak."""
    x = torch.ones(7)

    assert peak_allocated_bytes(lambda: x.add_(1)) < 64


def test_a_dense_linear_holds_its_output():
    """The count itself: `nn.Linear` holds its output and nothing more."""
    layer, x = nn.Linear(192, 640), torch.randn(512, 192)

    peak = peak_allocated_bytes(lambda: layer(x))

    assert peak == 4 * 512 * 640
