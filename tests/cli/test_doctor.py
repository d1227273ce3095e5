"""`memtile doctor`: what it finds, and the exit code; nothing is measured but in one test."""

import errno
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from given_rates import RATES
from rich.console import Console

from memtile.cli import main
from memtile.cli.doctor import show
from memtile.errors import HomeError, HomeFullError, UnsupportedPlatformError
from memtile.planner import machine_facts, machine_rates, machine_report, saved_rates
from memtile.planner.machine_facts import FolderFacts, SystemFacts
from memtile.planner.machine_report import Extra, report
from memtile.planner.moving_rates import MeasuredDisk
from memtile.testing import PeakMemory

GIB = 1 << 30
MEMORY = Path("/dev/shm")
EXTRA = Extra(mixed_bytes=9e8)
FOLDER = FolderFacts("/mnt/ssd", None, "ext4", True, 50 * GIB, 100 * GIB)
SYSTEM = SystemFacts(
    memory_bytes=16 * GIB,
    free_bytes=12 * GIB,
    limit_bytes=None,
    resource_limits={},
    processor="A Processor",
    processors=4,
    quota=None,
    threads=4,
    load=0.1,
    accelerator=None,
    accelerator_bytes=None,
    versions={"Python": "3.11", "peft": None},
)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Gives the folders that were measured, by a measurement that takes no time."""
    folders = []

    def measure(folder, started=None):
        folders.append(folder)
        if started:
            started("products")
        return RATES

    monkeypatch.setattr(machine_rates, "measured", measure)
    monkeypatch.setattr(machine_report, "_extra", lambda *given: EXTRA)
    monkeypatch.setattr(machine_facts, "_load", lambda: 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folders


def found(folder=FOLDER, system=SYSTEM, saved=None, now=RATES, extra=EXTRA):
    return report(folder, system, now, extra, saved, "/cache/rates.json")


def said(report, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    show(report, console)
    return console.export_text()


# What is found


def test_a_machine_without_faults(measured, tmp_path, capsys):
    """Tables with units, a verdict, exit code 0; the same numbers as JSON."""
    code = main(["doctor", str(tmp_path), "--json"])
    document = json.loads(capsys.readouterr().out)
    again = main(["doctor", str(tmp_path)])
    printed = capsys.readouterr().out

    assert (code, again, measured) == (0, 0, [tmp_path, tmp_path])
    assert document["problems"] == []
    assert document["folder"]["path"] == str(tmp_path)
    rates = {rate["what"]: rate["now"] for rate in document["rates"]}
    assert rates["disk, direct, read"] == RATES.read_bytes
    assert rates["disk, direct, both at once"] == EXTRA.mixed_bytes
    assert "1 GB/s" in printed
    assert "900 MB/s" in printed
    assert "50 GFLOP/s" in printed
    assert "100 µs/visit" in printed
    for row in document["free_from"]:
        assert row["tokens"] is None or f"{row['tokens']:,}" in printed
    assert "A run works here" in printed.splitlines()[-1]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_tables_fit_any_terminal(width):
    """No line is longer than the terminal, and no name or number is cut with an ellipsis."""
    printed = said(found(saved=RATES), width)

    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed


def test_piped_sentences_stay_one_line(measured, tmp_path, monkeypatch, capsys):
    """A problem is one line for other programs, however narrow the output."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(machine_facts, "free_bytes", lambda: 1 << 20)

    assert main(["doctor", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("problem: ") and "cgroup's limit" in line]


def test_rates_are_saved_for_plans_once(measured, tmp_path, capsys, monkeypatch):
    """The first measurement is saved, as a plan's would be; later ones are compared with it."""
    main(["doctor", str(tmp_path)])
    assert saved_rates.saved(tmp_path) == RATES
    slower = replace(RATES, read_bytes=RATES.read_bytes / 4)
    monkeypatch.setattr(machine_rates, "measured", lambda folder, started: slower)
    capsys.readouterr()

    assert main(["doctor", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert saved_rates.saved(tmp_path) == RATES
    assert "disk, direct, read: 0.25 ×" in printed
    assert str(saved_rates.place_of(tmp_path)) in printed
    assert "see the warnings" in printed


def test_a_busy_machine_is_not_what_plans_are_made_for(measured, tmp_path, monkeypatch, capsys):
    """Nothing is saved, and nothing that was saved is called wrong."""
    monkeypatch.setattr(machine_facts, "_load", lambda: 99.0)

    assert main(["doctor", str(tmp_path)]) == 0
    assert "99.0 other processes" in capsys.readouterr().out
    assert saved_rates.saved(tmp_path) is None
    other = replace(RATES, read_bytes=RATES.read_bytes / 4)
    assert len(found(system=replace(SYSTEM, load=99.0), saved=other).warnings) == 1
    assert len(found(saved=other).warnings) == 1


def test_without_a_saved_profile_there_is_no_column_for_it():
    """Two empty columns would say nothing."""
    assert "now / saved" not in said(found())
    assert "now / saved" in said(found(saved=RATES))


def test_without_direct_io_its_rates_are_not_claimed():
    """They would be those of the page cache; a warning says what follows."""
    seen = found(replace(FOLDER, direct=False, filesystem="9p"))

    assert not [rate for rate in seen.rates if "direct" in rate.what]
    assert {row.home for row in seen.free_from} == {"host", "page cache"}
    assert "direct I/O does not work in /mnt/ssd (9p)" in seen.warnings[0]
    assert seen.problems == ()


@pytest.mark.parametrize(
    ("system", "sentence"),
    [
        ({"threads": 8}, "OMP_NUM_THREADS=4"),
        ({"quota": 1.5}, "the time of 1.5 processors: set OMP_NUM_THREADS=1"),
        ({"load": 3.0}, "3.0 other processes were busy on 4 processors"),
        ({"free_bytes": None}, "no home uses the page cache"),
        ({"resource_limits": {"files (ulimit -f)": GIB}}, "files (ulimit -f) is limited to 1.00"),
    ],
)
def test_what_slows_a_run_down_is_a_warning(system, sentence):
    """One sentence with the way out, and no reason to stop."""
    seen = found(system=replace(SYSTEM, **system))

    assert len(seen.warnings) == 1
    assert sentence in seen.warnings[0]
    assert seen.problems == ()


def test_the_link_is_shown_where_there_is_an_accelerator():
    """Its name, memory and both directions."""
    system = replace(SYSTEM, accelerator="A Card", accelerator_bytes=24 * GIB)
    printed = said(found(system=system, extra=Extra(to_accelerator=25e9, from_accelerator=12e9)))

    for words in ("A Card, 24.0 GiB", "link to the accelerator", "25 GB/s", "12 GB/s"):
        assert words in printed


# What stops a run


@pytest.mark.skipif(not MEMORY.is_dir(), reason="this system has no /dev/shm")
def test_a_folder_in_memory_stops_a_run(measured, capsys):
    """Exit code 1 and the reason; what does not need the folder is measured all the same."""
    assert main(["doctor", str(MEMORY)]) == 1

    printed = " ".join(capsys.readouterr().out.split())
    assert "no home can be in /dev/shm: it is tmpfs" in printed
    assert "for 1 reason." in printed
    assert measured == [None]


def test_a_read_only_folder_stops_a_run(measured, tmp_path, monkeypatch, capsys):
    """Exit code 1 and the reason."""
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)

    assert main(["doctor", str(tmp_path)]) == 1
    assert "it may not be written to" in capsys.readouterr().out


def test_a_full_disk_stops_a_run(measured, tmp_path, monkeypatch, capsys):
    """It is not written to the last byte, and the sentence says what is free."""
    monkeypatch.setattr(machine_facts, "NEEDED_ROOM", shutil.disk_usage(tmp_path).total)

    assert main(["doctor", str(tmp_path)]) == 1
    assert "MiB are free there" in capsys.readouterr().out
    assert measured == [None]


def test_no_usable_default_stops_a_run(measured, monkeypatch, capsys):
    """Without a folder, the reasons of all defaults."""

    def refuse(folder):
        raise HomeError("no default is usable (/tmp: it is tmpfs); give a folder on a disk")

    monkeypatch.setattr(machine_facts, "usable_folder", refuse)

    assert main(["doctor"]) == 1
    assert "no default is usable (/tmp: it is tmpfs)" in capsys.readouterr().out


def test_a_measurement_that_fails_stops_a_run(measured, tmp_path, monkeypatch, capsys):
    """No rates are shown, and the error is the reason; JSON has it too."""

    def fail(folder, started):
        raise machine_rates.MeasuringError("the rates could not be measured")

    monkeypatch.setattr(machine_rates, "measured", fail)

    assert main(["doctor", str(tmp_path), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == ["the rates could not be measured"]
    assert (document["rates"], document["free_from"]) == ([], [])
    assert main(["doctor", str(tmp_path)]) == 1


def test_a_disk_that_fails_while_it_is_measured_stops_a_run(
    measured, tmp_path, monkeypatch, capsys
):
    """Such as a quota: the reason is one line, and the rest is measured without the disk."""

    def fail(*given):
        raise HomeFullError(errno.EDQUOT, "a home in x: 5 more bytes needed; make room")

    monkeypatch.setattr(machine_report, "_extra", fail)

    assert main(["doctor", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "problem: a home in x: 5 more bytes needed; make room" in printed
    assert "GFLOP/s" in printed
    assert measured == [None]


def test_a_system_without_proc_is_told(measured, tmp_path, monkeypatch, capsys):
    """Where peaks cannot be measured, the commands that report them would stop."""

    def refuse():
        raise UnsupportedPlatformError("Peak memory is read from Linux's /proc")

    monkeypatch.setattr(PeakMemory, "ensure_measurable", staticmethod(refuse))

    assert main(["doctor", str(tmp_path)]) == 1
    assert "Peak memory is read from" in capsys.readouterr().out


def test_another_system_is_told(measured, tmp_path, monkeypatch):
    """Homes on disk need Linux."""
    monkeypatch.setattr(sys, "platform", "darwin")

    assert "need Linux" in FolderFacts.of(tmp_path).why_unusable


def test_a_cache_that_cannot_be_written_is_a_warning(measured, tmp_path, monkeypatch, capsys):
    """Plans work, and measure anew each time."""
    (tmp_path / "cache").write_text("a file")

    assert main(["doctor", str(tmp_path)]) == 0
    assert "every plan measures anew: set XDG_CACHE_HOME" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_what_is_no_folder_is_wrong_input(measured, tmp_path, capsys, kind):
    """Exit code 2 and one sentence, before anything is measured."""
    (tmp_path / "file").write_text("")

    assert main(["doctor", str(tmp_path / kind)]) == 2
    printed = capsys.readouterr()
    assert (printed.out, measured) == ("", [])
    assert len(printed.err.splitlines()) == 1
    assert "give a folder on the disk that tiles will live on" in printed.err


# The measurements


def test_a_disk_is_measured_in_and_past_the_page_cache(tmp_path):
    """Each act moves or maps bytes, and nothing is left in the folder."""
    with MeasuredDisk(tmp_path) as disk:
        assert disk.map() > 0
        assert disk.mix() > 0

    assert list(tmp_path.iterdir()) == []


def test_the_process_that_measures_names_each_measurement(monkeypatch):
    """Its lines are handed on as they come, and an end without rates is an error with its log."""
    code = (
        "import sys; print('measuring: products'); print('anything'); print('measuring: memory');"
        "print('no rates', file=sys.stderr)"
    )
    real, names = machine_rates.subprocess.Popen, []
    monkeypatch.setattr(
        machine_rates.subprocess, "Popen", lambda words, **how: real([words[0], "-c", code], **how)
    )

    with pytest.raises(machine_rates.MeasuringError, match="no rates"):
        machine_rates.measured(None, names.append)
    assert names == ["products", "memory"]


def test_a_home_that_cannot_be_made_is_a_reason(tmp_path, monkeypatch):
    """What the filesystem refuses at the trial is said."""

    def refuse(folder):
        raise HomeError(f"a home in {folder} could not be mapped ({errno.ENODEV})")

    monkeypatch.setattr(machine_facts, "LiveFile", refuse)

    assert "could not be mapped" in FolderFacts.of(tmp_path).why_unusable
