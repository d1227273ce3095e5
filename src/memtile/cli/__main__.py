"""`python -m memtile.cli`: the same as the command `memtile`."""

import sys

from memtile.cli import main

if __name__ == "__main__":
    sys.exit(main())
