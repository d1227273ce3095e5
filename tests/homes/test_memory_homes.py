"""Homes in memory, the buffers that move tiles, and what a tensor's allocation is."""

import copy
import gc
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import memtile.homes
from memtile.errors import ArgumentError, HomeFullError
from memtile.homes import (
    PAGE,
    DeviceHome,
    DiskHome,
    HostHome,
    aligned_buffer,
    allocate_copy,
    allocation_of,
    register,
    resolve_home,
    word_for,
)

_TOO_MUCH = 1 << 60


def test_the_exported_names_are_there():
    """`memtile.homes` exports what a home and its users need, and every exported name exists."""
    assert set(memtile.homes.__all__) >= {
        "PAGE",
        "Allocation",
        "DeviceHome",
        "DiskHome",
        "Home",
        "HostHome",
        "Traffic",
        "aligned_buffer",
        "allocation_of",
        "register",
        "resolve_home",
        "allocate_copy",
    }
    assert all(hasattr(memtile.homes, name) for name in memtile.homes.__all__)


def test_testing_needs_no_test_runner():
    """memtile.testing is imported without pytest and hypothesis."""
    hide = "import sys; sys.modules.update(pytest=None, hypothesis=None); import memtile.testing"

    assert subprocess.run([sys.executable, "-c", hide], check=False).returncode == 0


@pytest.mark.parametrize(
    ("nbytes", "length"), [(0, 0), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)]
)
def test_a_buffer_is_whole_pages(nbytes, length):
    """An aligned buffer begins at a page, is rounded up to pages, and can be written."""
    buffer = aligned_buffer(nbytes)

    assert (buffer.dtype, buffer.shape) == (torch.uint8, (length,))
    assert buffer.data_ptr() % PAGE == 0
    assert bool((buffer.fill_(3) == 3).all())


def test_a_buffer_is_private_and_freed_with_its_tensor():
    """A buffer counts as this process's own data, and its memory goes back when it is dropped."""

    def data() -> int:
        gc.collect()
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmData")) * 1024

    before = data()
    buffer = aligned_buffer(64 << 20)
    assert data() - before >= 64 << 20
    del buffer

    assert data() - before < 32 << 20


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this kernel has no huge pages"
)
def test_a_large_buffer_is_in_huge_pages_that_lie_inside_it():
    """The kernel is asked for them, and no huge page takes memory beside the buffer."""
    huge, buffer = 2 << 20, aligned_buffer((7 << 20) + PAGE)
    begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()

    areas = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.M)
    huge_areas = [area.split()[0].split("-") for area in areas if re.search(r"Flags:.* hg\b", area)]
    clipped = [(max(begin, int(low, 16)), min(end, int(high, 16))) for low, high in huge_areas]
    asked = [(low, high) for low, high in clipped if low < high]
    assert asked == [(begin + -begin % huge, end - end % huge)]


@pytest.mark.parametrize("make_home", [DeviceHome, HostHome])
def test_memory_that_is_not_there_is_an_error(make_home):
    """An allocation or a reservation beyond all memory is HomeFullError; the home goes on."""
    with make_home() as home:
        for act in (
            lambda size: home.hold([size]),
            lambda size: home.allocate((size,), torch.uint8),
        ):
            with pytest.raises(HomeFullError):
                act(_TOO_MUCH)

        assert allocate_copy(home, torch.ones(3)).sum() == 3


@pytest.mark.parametrize("make_home", [DeviceHome, HostHome, DiskHome])
def test_parking_a_copy_keeps_no_source_and_takes_any_layout(make_home):
    """A transposed, expanded or requires-grad source is parked as a plain contiguous tensor."""
    with make_home() as home:
        base = torch.arange(12.0).view(3, 4)
        for source in (base.t(), base[:, 1], base[:1].expand(5, 4), base.clone().requires_grad_()):
            parked = allocate_copy(home, source)

            assert torch.equal(parked, source)
            assert parked.is_contiguous()
            assert not parked.requires_grad


def test_only_disk_is_not_worked_on_in_place():
    """Homes in memory are worked on where they lie, one on disk through a slab."""
    assert DeviceHome.works_in_place
    assert HostHome.works_in_place
    assert not DiskHome.works_in_place


@pytest.mark.parametrize("make_home", [DeviceHome, HostHome, DiskHome])
def test_an_allocation_is_dropped_when_the_tensor_lies_elsewhere(make_home):
    """Other data has no allocation, also with the same address in other strides or dtype."""
    with make_home() as home:
        parked = allocate_copy(home, torch.rand(4, 4))
        allocation = allocation_of(parked)
        for other in (
            parked.t(),
            parked.view(2, 8),
            parked[:2],
            parked.view(torch.int32),
        ):
            register(other, allocation)

            assert allocation_of(other) is None
        parameter = torch.nn.Parameter(parked)
        assert allocation_of(parameter) is None
        register(parameter, allocation)
        assert allocation_of(parameter) is allocation
        assert allocation_of(copy.deepcopy(parameter)) is None
        assert allocation_of(torch.ones(2)) is None


def test_the_registry_keeps_nothing_alive_and_marks_nothing():
    """A registered parameter dies when it is dropped, its allocation too; its pickle is clean."""
    home = HostHome()
    parameter = torch.nn.Parameter(allocate_copy(home, torch.rand(40)))
    allocation = home.allocate((40,), torch.float32)
    register(parameter, allocation)
    assert vars(parameter) == {}
    assert torch.equal(pickle.loads(pickle.dumps(parameter)), parameter)
    gone = weakref.ref(parameter), weakref.ref(allocation)

    del parameter, allocation
    gc.collect()

    assert [reference() for reference in gone] == [None, None]


def test_a_home_can_be_named(tmp_path):
    """Each word gives a home, a home is itself, and the word for a home gives one like it."""
    home = HostHome()
    kinds = {"device": DeviceHome, "host": HostHome, "disk": DiskHome, f"disk:{tmp_path}": DiskHome}

    for word, kind in kinds.items():
        assert type(resolve_home(word)) is kind
        assert type(resolve_home(word_for(resolve_home(word)))) is kind
        assert word_for(word) == word
    assert resolve_home(f"disk:{tmp_path}").folder == tmp_path
    assert word_for(DiskHome(tmp_path)) == f"disk:{tmp_path}"
    assert resolve_home("device", "meta").device.type == "meta"
    assert resolve_home(home) is home


@pytest.mark.parametrize("name", ["disc", "disk:", "host:/tmp", "HOST", "", "none", None, 3])
@pytest.mark.parametrize("act", [resolve_home, word_for])
def test_another_name_is_refused_with_the_way_out(act, name):
    """What is no home is refused; the message lists the words and names DiskHome."""
    words = r"must be disk, disk:FOLDER, host or device, or a home such as .*DiskHome\(folder\)"
    with pytest.raises(ArgumentError, match=words):
        act(name)
