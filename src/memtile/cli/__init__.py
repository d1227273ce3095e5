"""The command `memtile`: its door to people. `main` runs it and gives the exit code."""

from memtile.cli.app import main

__all__ = ["main"]
