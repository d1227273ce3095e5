"""Which pages of a file stay mapped: those in use, and at most so many bytes of others."""

import mmap

from memtile.homes.kernel import HUGE_PAGE
from memtile.homes.mapped_pages import _POPULATE_READ, _POPULATE_WRITE, MappedPages

P = HUGE_PAGE
DROP = mmap.MADV_DONTNEED


class Memory:
    """A map that notes what the kernel was told of it, in huge pages."""

    def __init__(self):
        self.told = []

    def madvise(self, advice, start, length):
        self.told.append((advice, start // P, (start + length) // P))


def use(pages, memory, start, stop, written=False):
    pages.use(start * P, memory, start * P, stop * P, written)


def test_a_room_is_mapped_once():
    """A second use needs no call, one that writes maps the pages to be written to."""
    pages, memory = MappedPages(), Memory()
    for _ in range(2):
        use(pages, memory, 0, 4)
        pages.release(0, None)
    for written in (True, True, False):
        use(pages, memory, 0, 4, written=written)
        pages.release(0, None)

    assert memory.told == [(_POPULATE_READ, 0, 4), (_POPULATE_WRITE, 0, 4)]


def test_neighbours_are_dropped_together():
    """Past the limit the oldest go, down to three quarters of it, and neighbours in one call."""
    pages, memory = MappedPages(), Memory()
    for start in (4, 0, 8, 12, 16):
        use(pages, memory, start, start + 4)
        pages.release(start * P, 16 * P)

    assert [call for call in memory.told if call[0] == DROP] == [(DROP, 0, 8)]


def test_a_huge_page_counts_once_and_whole():
    """Small rooms far apart take a huge page each, neighbours share one."""
    pages, memory, small = MappedPages(), Memory(), 4096
    for start in (0, small, 2 * small, 3 * P, 5 * P):
        pages.use(start, memory, start, start + small, written=False)
        pages.release(start, 2 * P)

    dropped = sum(call[0] == DROP for call in memory.told)
    assert dropped == 1 + 1  # the neighbours, and the next


def test_a_room_in_use_stays():
    """Rooms in use are not dropped, however many bytes they have."""
    pages, memory = MappedPages(), Memory()
    use(pages, memory, 0, 8)
    use(pages, memory, 8, 12)
    pages.release(8 * P, 0)
    assert [call for call in memory.told if call[0] == DROP] == [(DROP, 8, 12)]

    pages.release(0, 0)

    assert [call for call in memory.told if call[0] == DROP] == [(DROP, 8, 12), (DROP, 0, 8)]


def test_a_room_that_was_given_back_is_mapped_anew():
    """Another room at the same offset, of another size, is not taken for the first."""
    pages, memory = MappedPages(), Memory()
    use(pages, memory, 0, 2)
    pages.release(0, None)
    use(pages, memory, 0, 4)
    pages.release(0, 0)

    assert memory.told == [(_POPULATE_READ, 0, 2), (_POPULATE_READ, 0, 4), (DROP, 0, 4)]


def test_dropped_pages_are_mapped_again():
    """After a drop of one room, or of all, the next use maps pages."""
    pages, memory = MappedPages(), Memory()
    for act in (lambda: pages.discard(0), pages.clear, lambda: None):
        use(pages, memory, 0, 1)
        pages.release(0, None)
        act()

    assert [call[0] for call in memory.told] == [_POPULATE_READ] * 3


def test_a_finalizer_may_discard_rooms_while_others_are_dropped(monkeypatch):
    """Rooms that go while the oldest are looked for are left out, and the rest is dropped."""
    pages, memory = MappedPages(), Memory()
    for start in range(4):
        use(pages, memory, start, start + 1)
        pages.release(start * P, None)
    real = pages._take

    def take(offset):
        if offset == 0:
            real(P)  # as a finalizer of this thread would
        return real(offset)

    monkeypatch.setattr(pages, "_take", take)
    use(pages, memory, 8, 9)
    pages.release(8 * P, 0)

    assert [call[1:] for call in memory.told if call[0] == DROP] == [(0, 1), (2, 4), (8, 9)]
