"""Saving and resuming take a few MiB, however large the model is. Needs 2.5 GiB of disk."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import measured_training as measured
import pytest

MIB = 1 << 20


@pytest.mark.slow
def test_a_model_on_disk_is_saved_and_resumed_within_a_sixteenth(request):
    """256 MiB of weights and 512 of moments are saved and resumed with a few MiB in memory."""
    if shutil.disk_usage("/var/tmp").free < 3 << 30:
        pytest.skip("needs 3 GiB of disk in /var/tmp")
    folder = tempfile.TemporaryDirectory(dir="/var/tmp", prefix="memtile-test-")
    request.addfinalizer(folder.cleanup)
    arguments = [sys.executable, str(Path(measured.__file__)), folder.name]

    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=600)

    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert measured.WEIGHT_BYTES == 256 * MIB
    assert 3 * measured.WEIGHT_BYTES < found["file_bytes"] < 3 * measured.WEIGHT_BYTES + MIB
    assert found["save_bytes"] <= 48 * MIB  # 26 to 30 were seen
    assert found["resume_bytes"] <= 48 * MIB
    assert found["same"]
