"""Renews locks in a forked child, where the parent's thread that held one does not exist."""

import os
import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_renewals: "weakref.WeakKeyDictionary[Any, Callable[[Any], None]]" = weakref.WeakKeyDictionary()
_locks: list[Any] = []  # typeshed knows no _at_fork_reinit


def lock_of_a_module() -> threading.RLock:
    """A lock that is never dropped; in a forked child nobody holds it."""
    lock = threading.RLock()
    _locks.append(lock)
    return lock


def renew_in_child(thing: Any, renew: Callable[[Any], None]) -> None:
    """Call `renew` with the thing in every forked child, while the thing is alive.

    The system is told at the first call, and not when memtile is imported.
    """
    _renewals[thing] = renew
    _watch_forks()


@lru_cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_renew_all)


def _renew_all() -> None:
    for lock in _locks:
        lock._at_fork_reinit()  # as the standard library does with its own
    for thing, renew in list(_renewals.items()):
        renew(thing)
