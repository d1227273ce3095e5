"""`resolve_home`: a home from what the user gave; `word_for`: the word that names a home."""

from typing import Any, Final

import torch

from memtile.home_names import parse_home
from memtile.homes.disk import DiskHome
from memtile.homes.home import Home
from memtile.homes.memory_homes import DeviceHome, HostHome

_WAY_OUT: Final = ", or a home such as memtile.DiskHome(folder)"


def resolve_home(home: Home | str, device: Any = None) -> Home:
    """The home itself, or a new one for "disk", "disk:FOLDER", "host" or "device".

    Args:
        home: what the user gave.
        device: what "device" means, as torch takes it; None: torch's default device.

    Raises:
        ArgumentError: it is neither a home nor such a word.
        HomeError: a home on disk cannot be in that folder.
        HomeFullError: its disk is full.
    """
    if isinstance(home, Home):
        return home
    kind, folder = parse_home(home, more=_WAY_OUT)
    if kind == "disk":
        return DiskHome(folder)
    return HostHome() if kind == "host" else DeviceHome(torch.empty(0, device=device).device)


def word_for(home: Home | str) -> str:
    """The word that names a home of the same kind and folder; a word that names one is itself.

    Raises:
        ArgumentError: there is none.
    """
    if isinstance(home, DiskHome):
        return f"disk:{home.folder}"
    if isinstance(home, HostHome):
        return "host"
    if isinstance(home, DeviceHome):
        return "device"
    parse_home(home, more=_WAY_OUT)
    return str(home)
