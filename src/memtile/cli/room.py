"""The room on the disk of a folder."""

import os
import shutil
import sys
from pathlib import Path


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet.

    Without a limit where the filesystem tells no size, as some in user space.
    """
    place = next(each for each in (folder, *folder.absolute().parents) if os.path.isdir(each))
    disk = shutil.disk_usage(place)
    return disk.free if disk.total else sys.maxsize
