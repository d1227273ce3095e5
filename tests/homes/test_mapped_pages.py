"""Which huge pages of a file stay mapped: those in use, and at most so many bytes of others."""

import gc
import mmap

import pytest

from memtile.geometry import HUGE_PAGE
from memtile.homes.mapped_pages import _POPULATE_READ, _POPULATE_WRITE, MappedPages
from memtile.homes.segments import FreeRoom, Segment

P = HUGE_PAGE
DROP = mmap.MADV_DONTNEED
OFFSET = 4096  # of the segment in its file: its first huge page is shorter by it


class Memory:
    """A map of 32 huge pages that notes what the kernel was told of it, in huge pages."""

    def __init__(self):
        self.told, self.refuses = [], ()

    def __len__(self):
        return 32 * P - OFFSET

    def madvise(self, advice, start, length):
        whole = [(at + OFFSET * bool(at)) // P for at in (start, start + length)]
        if advice != DROP and whole[0] in self.refuses:
            raise OSError(5, "Input/output error")
        self.told.append((advice, *whole))

    @property
    def dropped(self):
        return [call[1:] for call in self.told if call[0] == DROP]


def make():
    memory = Memory()
    segment = Segment(OFFSET, memory, FreeRoom(len(memory)))
    pages = MappedPages()
    return (
        pages,
        memory,
        lambda start, stop: pages.windows(segment, max(0, start * P - OFFSET), stop * P - OFFSET),
    )


def visit(pages, windows, kept=None, written=False):
    pages.use(windows, written)
    pages.release(windows, kept)


def test_huge_pages_are_mapped_once():
    """A second use needs no call, one that writes maps the pages to be written to."""
    pages, memory, windows = make()
    for written in (False, False, True, True, False):
        visit(pages, windows(0, 1), written=written)

    assert memory.told == [(_POPULATE_READ, 0, 1), (_POPULATE_WRITE, 0, 1)]


def test_rooms_of_one_huge_page_share_it():
    """Small rooms that are neighbours map it once, and it goes once both are unused."""
    pages, memory, _ = make()
    segment = Segment(OFFSET, memory, FreeRoom(len(memory)))
    first, second = pages.windows(segment, 0, 100), pages.windows(segment, 100, 9000)
    assert first == second
    pages.use(first, written=False)
    visit(pages, second, kept=0)
    assert memory.told == [(_POPULATE_READ, 0, 1)]

    pages.release(first, 0)

    assert memory.told[1:] == [(DROP, 0, 1)]


def test_neighbours_are_dropped_together():
    """Past the limit the oldest go, down to half of it, those with nothing between at once."""
    pages, memory, windows = make()
    for start in (4, 0, 8, 20, 16):
        visit(pages, windows(start, start + 4), kept=19 * P)

    assert memory.dropped == [(0, 11)]  # 11 and 20 to 24 are newer


def test_what_lies_between_unmapped_is_dropped_with_it():
    """One call for two that have nothing mapped in between."""
    pages, memory, windows = make()
    for start in (0, 4, 8):
        visit(pages, windows(start, start + 1), kept=2 * P)

    assert memory.dropped == [(0, 5)]


def test_what_is_in_use_stays():
    """It is not dropped, however much it is, and neither is it between two that are."""
    pages, memory, windows = make()
    used = windows(1, 3)
    pages.use(used, written=False)
    for start in (0, 3):
        visit(pages, windows(start, start + 1))
    visit(pages, windows(4, 5), kept=1 * P)
    assert memory.dropped == [(0, 1), (3, 5)]

    pages.release(used, 0)

    assert memory.dropped[2:] == [(1, 3)]


def test_dropped_pages_are_mapped_again():
    """After one huge page was evicted, or all were dropped, the next use maps it."""
    pages, memory, windows = make()
    found = windows(0, 1)
    for act in (lambda: pages.evict(found), pages.clear, lambda: None):
        visit(pages, found)
        act()

    assert [call[0] for call in memory.told if call[0] != DROP] == [_POPULATE_READ] * 3


def test_what_is_in_use_is_not_evicted():
    """Only the huge pages of a room that nobody uses are dropped."""
    pages, memory, windows = make()
    pages.use(windows(0, 1), written=False)
    found = windows(0, 2)
    visit(pages, found)
    pages.evict(found)

    assert memory.dropped == [(1, 2)]


def test_an_error_leaves_nothing_in_use():
    """Where one of several cannot be mapped, the others are idle and are dropped in their turn."""
    pages, memory, windows = make()
    memory.refuses = (2,)
    with pytest.raises(OSError, match="Input"):
        pages.use(windows(0, 4), written=False)
    visit(pages, windows(8, 9), kept=0)

    assert memory.dropped == [(2, 3), (0, 9)]


def test_a_finalizer_may_evict_while_others_are_dropped(monkeypatch):
    """What goes while the oldest are looked for does no harm, and the rest is dropped."""
    pages, memory, windows = make()
    found = [windows(start, start + 1) for start in range(4)]
    for each in found:
        visit(pages, each)
    real, done = pages._drop_oldest, []

    def drop(left):
        pages.evict(found[1])  # as a finalizer of this thread would
        done.append(left)
        real(left)

    monkeypatch.setattr(pages, "_drop_oldest", drop)
    visit(pages, windows(8, 9), kept=0)

    assert done == [0]
    assert memory.dropped == [(1, 2), (0, 9)]


def test_windows_go_with_those_that_use_them():
    """What is not mapped is kept by nobody else; what is idle stays until it is dropped."""
    pages, _, windows = make()
    visit(pages, windows(0, 2))
    windows(4, 6)
    gc.collect()
    assert len(pages._windows) == 2

    pages.clear()
    gc.collect()

    assert not pages._windows
