"""What an observation is saved as: a trace for Perfetto, a picture, and tables."""

import os
from pathlib import Path

import pytest
import rich
import torch
from parked_layers import small_model
from trace_events import read_trace

import memtile
from memtile.errors import ArgumentError
from memtile.observing import Event, Observation
from memtile.observing.intervals import own_pieces, shares, slabs_in_use, union
from memtile.observing.picture import _heights
from memtile.observing.recording import FORWARD, READ, SLABS, WAIT_FOR_READ
from memtile.observing.summary import notes_on, rows_of


@pytest.fixture(scope="module")
def seen() -> Observation:
    """Gives one step of a small model, observed."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memtile.homes.limits.free_bytes", lambda: 0)
        return _observed_step()


def _observed_step() -> Observation:
    model = memtile.tile(small_model(), out_splits=3, in_splits=2, home="disk")
    optimizer = memtile.TileOptimizer(model, torch.optim.AdamW, mode="in_backward", lr=1e-3)
    with memtile.observe() as found:
        model(torch.randn(5, 13)).square().mean().backward()
        optimizer.step()
    return found


@pytest.fixture(scope="module")
def nothing() -> Observation:
    """Gives a block in which no tile was used."""
    with memtile.observe() as found:
        pass
    return found


def test_the_trace_keeps_the_event_format(seen, tmp_path):
    """Required fields of each phase, times in order, nested on each thread, and named threads."""
    seen.save(tmp_path / "step.json")

    events = read_trace(tmp_path / "step.json")
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len([each for each in seen.events if each.kind != SLABS])
    assert max(e["ts"] + e["dur"] for e in complete) <= seen.seconds * 1e6
    assert {"MainThread"} < {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    moved = sum(entry["args"].get("bytes", 0) for entry in complete if entry["cat"] == READ)
    assert moved == sum(each.amount for each in seen.events if each.kind == READ)


def test_slabs_in_use_are_given_back(seen, tmp_path):
    """The counter begins above zero and ends at zero."""
    seen.save(str(tmp_path / "step.json"))

    counts = [e["args"]["slabs"] for e in read_trace(tmp_path / "step.json") if e["ph"] == "C"]
    assert counts[0] > 0
    assert counts[-1] == 0


def test_the_picture_is_a_png(seen, nothing, tmp_path):
    """Of a step, and of a block in which nothing happened."""
    for number, each in enumerate((seen, nothing)):
        each.save(tmp_path / f"{number}.PNG")
        assert (tmp_path / f"{number}.PNG").read_bytes().startswith(b"\x89PNG")


def test_nothing_recorded_is_said(nothing, tmp_path):
    """The table says so, and the trace is one without events."""
    nothing.save(tmp_path / "none.json")

    assert "no parked tile was used" in str(nothing)
    assert [event["ph"] for event in read_trace(tmp_path / "none.json")] == ["M"]


def test_the_tables_have_the_same_cells(seen):
    """As text, and printed by rich."""
    with rich.get_console().capture() as printed:
        rich.get_console().print(seen, width=200)

    for row in seen._rows():
        assert row.name in str(seen)
        assert row.name in printed.get()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("step.svg", r"ends in \.json"),
        ("step", r"ends in \.json"),
        ("absent/step.json", "no folder to be in"),
        ("folder.json", "is a folder"),
    ],
)
def test_a_path_that_cannot_be_is_refused(seen, tmp_path, name, problem):
    """One sentence with the way out, and nothing is written."""
    (tmp_path / "folder.json").mkdir()

    with pytest.raises(ArgumentError, match=problem):
        seen.save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.json"]


@pytest.mark.parametrize("given", [None, 7])
def test_what_is_no_path_is_refused(seen, given):
    """As a path that ends wrongly."""
    with pytest.raises(ArgumentError, match="saved to a path"):
        seen.save(given)


def test_a_folder_that_may_not_be_written_to_is_refused(seen, tmp_path, monkeypatch):
    """Before anything is made: root may write anywhere, so the system's answer is given here."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    with pytest.raises(ArgumentError, match="may not be written to"):
        seen.save(tmp_path / "step.json")


def test_a_picture_without_matplotlib_says_what_to_install(seen, tmp_path, monkeypatch):
    """And that a trace needs none."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    with pytest.raises(ArgumentError, match=r"pip install matplotlib, or save to a \.json"):
        seen.save(tmp_path / "step.png")


def test_a_failed_write_leaves_what_was_there(seen, tmp_path, monkeypatch):
    """A full disk: the error comes out, the old file is whole, and no part of a new one is left."""
    (tmp_path / "step.json").write_text("old")

    def full(path: Path, *given: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("memtile.observing.chrome.write", full)
    with pytest.raises(OSError, match="No space left"):
        seen.save(tmp_path / "step.json")

    assert (tmp_path / "step.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


def event(kind: str, begun: int, ended: int, thread: int = 1, amount: int = 0) -> Event:
    return Event(kind, begun, ended, thread, f"tile of {begun}", amount)


NESTED = [
    event(SLABS, 0, 90, amount=2),
    event(FORWARD, 0, 100),
    event(WAIT_FOR_READ, 10, 30),
    event(READ, 12, 20),
    event(READ, 15, 40, thread=2),
    event(SLABS, 50, 60, amount=1),
    event(WAIT_FOR_READ, 60, 70),
    event(FORWARD, 100, 130),
]


def test_an_event_is_not_at_work_inside_another():
    """Each moment of a thread belongs to the innermost event."""
    pieces = [(each.kind, *piece) for each, piece in own_pieces(NESTED) if each.thread == 1]

    assert sorted(pieces, key=lambda each: each[1:]) == [
        (FORWARD, 0, 10),
        (WAIT_FOR_READ, 10, 12),
        (READ, 12, 20),
        (WAIT_FOR_READ, 20, 30),
        (FORWARD, 30, 60),
        (WAIT_FOR_READ, 60, 70),
        (FORWARD, 70, 100),
        (FORWARD, 100, 130),
    ]


def test_overlaps_count_once():
    """Of reads in several threads, and of slabs each one."""
    assert union([(15, 40), (12, 20), (40, 41), (50, 60)]) == [(12, 41), (50, 60)]
    assert slabs_in_use(NESTED) == [(0, 2), (50, 3), (60, 2), (90, 0)]


def test_shares_of_columns():
    """Pieces shorter than a column add up in it, longer ones fill some, by weight; none is lost."""
    pieces = [((100, 105), 1.0), ((107, 109), 0.5), ((115, 140), 1.0)]

    assert shares(pieces, 100, 10.0, 4) == pytest.approx([0.6, 0.5, 1.0, 1.0])
    assert shares([((100, 140), 0.5)], 100, 10.0, 3) == [0.5, 0.5, 0.5]


def test_lanes_of_the_picture():
    """A forward is not as high while it waits; slabs are measured against the most; no writes."""
    heights = _heights(NESTED, 0, 100.0 / 500)

    assert heights.keys() == {FORWARD, WAIT_FOR_READ, READ, SLABS}
    assert heights[FORWARD][:200:50] == [1, 0, 0, 1]
    assert heights[WAIT_FOR_READ][:200:50] == [0, 1, 1, 0]
    assert heights[READ][:250:50] == [0, 0, 1, 1, 0]
    assert heights[SLABS][200::50] == pytest.approx([2 / 3, 1, 2 / 3, 2 / 3, 2 / 3, 0])


def test_rows_and_notes_of_known_spans():
    """A wait is not the forward's time, a read in it not the wait's; its tile is the forward's."""
    rows = {row.name: (row.count, round(row.seconds * 1e9)) for row in rows_of(NESTED, 150e-9)}

    assert rows == {
        FORWARD: (2, 100),
        WAIT_FOR_READ: (2, 22),
        "outside of tiles": (0, 20),
        "meanwhile, read": (2, 28),
    }
    assert any("waited longest for: tile of 0 (0.0 ms)" in each for each in notes_on(NESTED, 1, 0))
