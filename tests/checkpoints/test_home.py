"""A checkpoint's files as a home: they are mapped, read directly, and never written to."""

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch
from read_only_contract import ReadOnlyHomeContract
from safetensors_files import entry, outgoing_of, raw_file
from torch import Tensor

from memtile.checkpoints import Checkpoint, CheckpointHome, write_checkpoint
from memtile.checkpoints.copied_pages import CopiedPages
from memtile.errors import CheckpointError, HomeError
from memtile.homes import Allocation, Ending, aligned_buffer, disk_io, kernel_aio
from memtile.transfer import rings_of


def allocations_over(folder, tensors):
    """A checkpoint of the tensors, and where each lies in it."""
    named = {f"{number:03}": tensor for number, tensor in enumerate(tensors)}
    write_checkpoint(folder, outgoing_of(named))
    checkpoint, home = Checkpoint.open(folder), CheckpointHome()
    return [home.rows_of(checkpoint[name], 0, named[name].shape) for name in named]


class TestCheckpointHome(ReadOnlyHomeContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path

    def make_allocations(self, tensors: list[Tensor]) -> list[Allocation]:
        return allocations_over(self.folder, tensors)


class TestWithoutPagemap(TestCheckpointHome):
    """The same where the kernel does not tell of written pages."""

    @pytest.fixture(autouse=True)
    def _no_pagemap(self, monkeypatch):
        monkeypatch.setattr("memtile.checkpoints.copied_pages._PAGEMAP", "/nowhere")


class TestDirectly(TestCheckpointHome):
    """The same where the tiles do not fit into the page cache."""

    @pytest.fixture(autouse=True)
    def _no_room(self, monkeypatch):
        monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: 0)


def in_pieces(folder, tensors, page=4096):
    """As `allocations_over`, each tensor stored in pieces of a page, with others between them."""
    named, pieces = {}, []
    for number, tensor in enumerate(tensors):
        flat, step = tensor.reshape(-1), page // tensor.element_size()
        parts = flat.split(step) if flat.numel() else [flat]
        pieces.append([(f"{number:03}.{at:05}.a", len(part)) for at, part in enumerate(parts)])
        for (name, _), part in zip(pieces[-1], parts, strict=True):
            named |= {name: part, f"{name}.filler": torch.ones(step, dtype=tensor.dtype)}
    write_checkpoint(folder, outgoing_of(named))
    checkpoint, home = Checkpoint.open(folder), CheckpointHome()
    return [
        home.elements_of([(checkpoint[name], 0, count) for name, count in each], tensor.shape)
        for each, tensor in zip(pieces, tensors, strict=True)
    ]


class TestInPieces(TestCheckpointHome):
    """The same where each tensor lies in several places, which meet inside pages."""

    @pytest.fixture(autouse=True)
    def _small(self, monkeypatch):
        monkeypatch.setattr("memtile.checkpoints.home._LEAST_PIECE", 0)

    def make_allocations(self, tensors: list[Tensor]) -> list[Allocation]:
        return in_pieces(self.folder, tensors)


class TestInPiecesDirectly(TestInPieces, TestDirectly):
    """And they do not fit into the page cache."""


class TestInPiecesWithoutPagemap(TestInPieces):
    """And the kernel does not tell of written pages."""

    @pytest.fixture(autouse=True)
    def _no_pagemap(self, monkeypatch):
        monkeypatch.setattr("memtile.checkpoints.copied_pages._PAGEMAP", "/nowhere")


def test_pieces_stay_in_the_file_but_for_their_seams(tmp_path):
    """Of a tile in four pieces, at most a page for each border is memory of its own."""
    pieces = [torch.full((64 << 10,), float(number)) for number in range(4)]
    named = {f"{number}": piece for number, piece in enumerate(pieces)}
    named |= {f"{number}.other": torch.ones(1024) for number in range(4)}
    write_checkpoint(tmp_path, outgoing_of(named))
    checkpoint, home = Checkpoint.open(tmp_path), CheckpointHome()

    allocation = home.elements_of(
        [(checkpoint[str(n)], 0, 64 << 10) for n in range(4)], (256 << 10,)
    )

    assert torch.equal(allocation.tensor(), torch.cat(pieces))
    allocation.read(room := aligned_buffer(1 << 20))
    assert torch.equal(room.view(torch.float32), torch.cat(pieces))
    copied = sum(home.pages._copied(allocation.address, allocation.nbytes).tolist())
    assert copied <= 3


@pytest.mark.parametrize("element", [0, 1500, 2047, 2048, 5000, 8191])
def test_a_write_anywhere_is_known(tmp_path, element, monkeypatch):
    """A tile in pieces is untouched until one value is changed, at a seam too; reads touch none."""
    monkeypatch.setattr("memtile.checkpoints.home._LEAST_PIECE", 0)
    (allocation,) = in_pieces(tmp_path, [torch.arange(8192.0)], page=8192)
    assert len(allocation._runs) > len(allocation._files) + 1

    tensor = allocation.tensor()
    assert tensor.sum() == sum(range(8192))
    assert allocation.is_untouched()
    tensor[element] += 1

    assert not allocation.is_untouched()


def test_neighbours_in_a_file_are_one_piece(tmp_path):
    """Tensors that follow one another need no alignment and no seam."""
    named = {"a": torch.ones(3), "b": torch.arange(50.0), "c": -torch.arange(70.0)}
    write_checkpoint(tmp_path, outgoing_of(named))
    found = Checkpoint.open(tmp_path)

    allocation = CheckpointHome().elements_of([(found["b"], 0, 50), (found["c"], 0, 70)], (120,))

    assert torch.equal(allocation.tensor(), torch.cat([named["b"], named["c"]]))


@pytest.mark.parametrize(
    ("length", "reason"), [(300, "2 pieces, of 1200 bytes"), (9000, "bytes of")]
)
def test_pieces_that_make_no_map_give_the_reason(length, reason, tmp_path):
    """Too small, or at different bytes of a page."""
    write_checkpoint(tmp_path, outgoing_of({n: torch.ones(length) for n in "abc"}))
    found = Checkpoint.open(tmp_path)

    told = CheckpointHome().elements_of([(found[n], 0, length) for n in "ac"], (2 * length,))

    assert reason in told


def test_the_kernel_tells_of_written_pages():
    """It does here, so the tests above ran with and without it."""
    assert CopiedPages().works


def test_writes_never_reach_the_file(tmp_path):
    """The bytes of the checkpoint are the same, whatever is done to its tensors."""
    (allocation,) = allocations_over(tmp_path, [torch.arange(5000.0)])
    path = tmp_path / "model.safetensors"
    before = path.read_bytes()

    allocation.tensor().fill_(7)
    allocation.evict()
    allocation.home.close()

    assert path.read_bytes() == before


@pytest.mark.parametrize("start", [0, 1, 100, 2000])
@pytest.mark.parametrize("size", [1, 3000, 4096, 4100, 9000, 30_000])
def test_any_bytes_of_a_file_can_be_read_directly(tmp_path, start, size):
    """From any byte to any address, up to the file's end; no other byte is changed."""
    path, content = tmp_path / "bytes", torch.arange(40_000, dtype=torch.int32).view(torch.uint8)
    path.write_bytes(content[:39_999].numpy().tobytes())
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    for offset in (0, 8, 4088, 4096, 5000, 39_999 - size, 39_999):
        memory = aligned_buffer(size + start + 1)

        done = disk_io.fill_directly(fd, memory[start : start + size], offset)

        assert done == (offset + size <= 39_999)
        if done:
            assert torch.equal(memory[start : start + size], content[offset : offset + size])
            assert not memory[:start].any()
            assert not memory[start + size :].any()
    os.close(fd)


def test_reads_go_past_the_page_cache_where_tiles_do_not_fit_there(tmp_path, monkeypatch):
    """What fits into half of the free memory is read through the page cache, the rest directly."""
    direct = []
    monkeypatch.setattr(disk_io, "fill_directly", lambda *given: direct.append(given) or False)
    for free, path in ((1 << 60, "buffered"), (0, "direct")):
        monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda free=free: free)
        (allocation,) = allocations_over(tmp_path, [torch.arange(5000.0)])

        allocation.read(piece := aligned_buffer(4096))

        assert allocation.home.path == path
        assert bool(direct) == (path == "direct")
        assert torch.equal(piece.view(torch.float32), torch.arange(1024.0))


@pytest.fixture
def by_the_kernel(tmp_path, monkeypatch):
    """Tiles of all kinds that are read by the kernel's queue, their values, and a ring for them."""
    monkeypatch.setattr("memtile.homes.limits.free_bytes", lambda: 0)
    if kernel_aio.kernel_queue() is None:
        pytest.skip("no io_submit here")
    torch.manual_seed(0)
    sizes = (1, 5, 1024, 1023, 5000, 300_000, 1024, 0, 7)  # the last one ends with the file
    tensors = [torch.rand(size) for size in sizes]
    allocations = allocations_over(tmp_path, tensors)
    return allocations, tensors, rings_of(allocations[0].home).weights


def read_by_the_kernel(allocation):
    """The values of one of its tiles, which no thread has read."""
    memory, ending = aligned_buffer(allocation.room), Ending()
    assert allocation.home.start_moves([(allocation, memory)], False, ending)
    ending.result()
    return memory[: allocation.nbytes].view(allocation.dtype).view(allocation.shape)


def test_the_kernel_reads_any_bytes_of_a_file(by_the_kernel, monkeypatch):
    """From any byte to the file's last one; their values lie at a page's beginning."""
    allocations, tensors, _ = by_the_kernel
    monkeypatch.setattr("memtile.checkpoints.home._fill", None)  # what threads would use

    for allocation, tensor in zip(allocations, tensors, strict=True):
        if tensor.numel():
            assert torch.equal(read_by_the_kernel(allocation), tensor)


def test_a_part_that_the_kernel_did_not_read_is_read_again(by_the_kernel, monkeypatch):
    """As threads read it, also where the part ends inside the tile."""
    allocations, tensors, _ = by_the_kernel
    end = kernel_aio._UnderWay.end
    monkeypatch.setattr(
        kernel_aio._UnderWay, "end", lambda self, number, found: end(self, number, found // 2)
    )

    for number in (2, 5, 6):
        assert torch.equal(read_by_the_kernel(allocations[number]), tensors[number])


def test_a_tile_that_was_written_to_is_not_read_by_the_kernel(by_the_kernel):
    """Its copied pages are in this process alone; the ring gives what was written."""
    allocations, tensors, ring = by_the_kernel
    allocations[5].tensor()[70_000] = 7

    assert not allocations[5].home.start_moves(
        [(allocations[5], aligned_buffer(allocations[5].room))], False, Ending()
    )
    tensors[5][70_000] = 7
    for allocation, tensor in zip(allocations, tensors, strict=True):
        with ring.acquire((allocation,)) as lease:
            assert torch.equal(lease.tensors[0], tensor)


def test_a_file_that_changed_is_an_error_where_its_tile_is_waited_for(by_the_kernel, tmp_path):
    """As where threads read it."""
    allocations, _, ring = by_the_kernel
    os.utime(tmp_path / "model.safetensors", (1, 1))

    with (
        pytest.raises(CheckpointError, match="was written to while it was in use"),
        ring.acquire((allocations[2],)),
    ):
        pass


def test_a_file_that_changes_is_noticed_at_the_next_read(tmp_path):
    """Reading and evicting both raise for a file that was rewritten in place."""
    (allocation,) = allocations_over(tmp_path, [torch.arange(5000.0)])
    allocation.read(piece := aligned_buffer(4096))

    os.utime(tmp_path / "model.safetensors", (1, 1))

    with pytest.raises(CheckpointError, match="was written to while it was in use"):
        allocation.read(piece)
    with pytest.raises(CheckpointError, match="was written to while it was in use"):
        allocation.evict()


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path):
    """A new checkpoint in the same folder does not change the tiles of the old one."""
    (allocation,) = allocations_over(tmp_path, [torch.arange(5000.0)])

    write_checkpoint(tmp_path, outgoing_of({"000": torch.zeros(5000)}))

    assert torch.equal(allocation.tensor(), torch.arange(5000.0))


def test_files_stay_mapped_without_being_open(tmp_path, monkeypatch):
    """Of many shards a few are open; one that is closed and replaced is read through its map."""
    monkeypatch.setattr("memtile.checkpoints.stored.MOST_OPEN", 2)
    tensors = {name: torch.arange(5000.0) + number for number, name in enumerate("abcde")}
    write_checkpoint(tmp_path, outgoing_of(tensors), max_shard_bytes=1)
    checkpoint, home = Checkpoint.open(tmp_path), CheckpointHome()
    allocations = {name: home.rows_of(found, 0, (5000,)) for name, found in checkpoint.items()}
    piece = aligned_buffer(20_000)

    write_checkpoint(tmp_path, outgoing_of({"a": torch.zeros(5000)}))

    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(str(tmp_path) in link for link in links) == 2
    for name, allocation in allocations.items():
        allocation.read(piece)
        assert torch.equal(piece.view(torch.float32)[:5000], tensors[name])
        allocation.evict()


def test_a_stretch_is_rows_of_its_tensor(tmp_path):
    """An allocation begins at the element that is asked for."""
    tensor = torch.arange(60.0).view(12, 5)
    write_checkpoint(tmp_path, outgoing_of({"a": torch.ones(3), "m": tensor}))

    allocation = CheckpointHome().rows_of(Checkpoint.open(tmp_path)["m"], 35, (3, 5))

    assert torch.equal(allocation.tensor(), tensor[7:10])


def test_a_misaligned_tensor_has_no_stretch(tmp_path):
    """A tensor that is not aligned in its file gives the reason."""
    header = {"a": entry("U8", [3], 0, 3), "m": entry("F32", [2], 3, 11)}
    path = raw_file(tmp_path / "model.safetensors", header, bytes(11))

    reason = CheckpointHome().rows_of(Checkpoint.open(path)["m"], 0, (2,))

    assert "not aligned for torch.float32" in reason


def test_a_fork_sees_its_own_pages(tmp_path):
    """A child that writes to a tile reads what it wrote, and the parent does not."""
    (allocation,) = allocations_over(tmp_path, [torch.zeros(5000)])
    allocation.read(piece := aligned_buffer(4096))

    child = os.fork()
    if not child:
        allocation.tensor()[:8].fill_(5)
        allocation.read(piece)
        os._exit(0 if bool((piece.view(torch.float32)[:8] == 5).all()) else 1)
    status = os.waitpid(child, 0)[1]

    allocation.read(piece)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not piece.any()


def test_pages_of_a_stretch_are_dropped(tmp_path):
    """Evicted pages of the map are no longer in this process's memory."""
    (allocation,) = allocations_over(tmp_path, [torch.zeros(8 << 20)])
    allocation.tensor().sum()
    before = shared_pages()

    allocation.evict()

    assert before - shared_pages() > (30 << 20) // mmap.PAGESIZE


def shared_pages():
    """Pages of files in this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[2])


def test_a_file_that_cannot_be_mapped_is_refused(tmp_path, monkeypatch):
    """On a filesystem that cannot map files the message has two ways out."""
    write_checkpoint(tmp_path, outgoing_of({"a": torch.arange(6.0).view(3, 2)}))
    stored, home = Checkpoint.open(tmp_path)["a"], CheckpointHome()

    def refusing(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("memtile.checkpoints.home.private_map", refusing)
    with pytest.raises(HomeError, match=r"No such device.*copy the checkpoint to a local disk, or"):
        home.rows_of(stored, 0, stored.shape)
