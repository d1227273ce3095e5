"""The machine and the versions that the demo's numbers come from."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from memtile.cli.demo.records import Machine

_CPUINFO = Path("/proc/cpuinfo")


def this_machine() -> Machine:
    """What to name beside any number measured here."""
    return Machine(
        processor=_processor(),
        logical_cpus=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=version("torch"),
        transformers=version("transformers"),
        memtile=version("memtile"),
    )


def _processor() -> str:
    if _CPUINFO.is_file():
        for line in _CPUINFO.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
