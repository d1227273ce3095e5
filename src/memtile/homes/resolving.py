"""A home from what a user named it."""

from memtile.errors import ArgumentError
from memtile.homes.home import Home
from memtile.homes.memory_homes import DeviceHome, HostHome


def resolve_home(home: Home | str) -> Home:
    """The home itself, or a new one for "device" or "host".

    Raises:
        ArgumentError: it is neither.
    """
    if isinstance(home, Home):
        return home
    if home == "device":
        return DeviceHome()
    if home == "host":
        return HostHome()
    raise ArgumentError(
        f'home={home!r}: it must be "device", "host" or a home; for a home on disk give '
        "memtile.DiskHome(folder)"
    )
