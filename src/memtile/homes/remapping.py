"""A shared map of a file turned into a private one in place, under tensors that lie over it."""

import ctypes
import mmap
import os

_FIXED = 0x10  # MAP_FIXED in Linux's <sys/mman.h>, alpha and parisc apart; mmap has no name for it


def remap_privately(memory: mmap.mmap, fd: int, offset: int) -> None:
    """Makes the memory a private copy of the file's bytes, page by page as it is written to.

    Its address and its contents stay, so whatever lies over it goes on; the file changes no more.

    Args:
        memory: a shared map of the file, as long as it was made.
        fd: the file, open for reading and writing.
        offset: where in the file the map begins.

    Raises:
        OSError: the system refused; the map is shared as before.
    """
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _FIXED
    got = library.mmap(address, len(memory), access, kind, fd, offset)
    if got != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
