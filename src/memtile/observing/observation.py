"""`observe`: records what happens to parked tiles inside a block."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memtile.errors import ArgumentError
from memtile.observing import chrome, picture, summary
from memtile.observing.recording import Event, Recorder, clock, start, stop

if TYPE_CHECKING:
    from rich.table import Table

_WRITERS: Final[dict[str, Callable[["Observation", Path], None]]] = {
    ".json": lambda seen, path: chrome.write(path, seen.events, seen.threads, seen.begun_ns),
    ".png": lambda seen, path: picture.draw(path, seen.events, seen.begun_ns, seen.seconds),
}
_NOT_BEGUN: Final = "nothing was observed yet: with memtile.observe() as seen: …"


def observe(max_events: int = 100_000) -> "Observation":
    """A context manager that records what is read, written, computed and waited for inside.

    Reads and writes of homes, forwards, backwards and optimizer steps of parked tiles, waits and
    slabs in use, of all models and threads of the process: 14 events a step for a tile of 1 MiB, 29
    for one of 16 MiB. Times are those of the CPU: on a GPU, kernels run on after the event that
    started them.

    Blocks may be nested, and be entered in several threads at once: each records all of it. After
    an exception in the block, what was recorded until then is there.

    Args:
        max_events: later ones are counted, and not kept. An event takes about 200 bytes of memory.

    Raises:
        ArgumentError: `max_events` is no number of events.

    Examples:
        >>> with memtile.observe() as seen:
        ...     loss = model(torch.randn(8, 64)).sum()
        >>> table = str(seen)
        >>> seen.save("step.json")  # open it in https://ui.perfetto.dev
        >>> seen.save("step.png")
    """
    if type(max_events) is not int or max_events < 1:
        raise ArgumentError(f"max_events={max_events!r}: it must be a whole number, at least 1")
    return Observation(max_events)


class Observation:
    """What `observe` recorded. It may be read inside the block too, for what has ended so far."""

    def __init__(self, max_events: int) -> None:
        self._recorder = Recorder(max_events)

    def __enter__(self) -> "Observation":
        if self._recorder.begun_ns:
            raise ArgumentError("this observation was made already: call memtile.observe() again")
        start(self._recorder)
        return self

    def __exit__(self, *raised: object) -> None:
        stop(self._recorder)

    @property
    def events(self) -> list[Event]:
        """All events, by when they began."""
        events = (Event(*each) for each in self._recorder.events)
        return sorted(events, key=lambda event: (event.begun_ns, -event.ended_ns))

    @property
    def threads(self) -> dict[int, str]:
        """The names of the threads that events are of."""
        return self._recorder.threads

    @property
    def begun_ns(self) -> int:
        """When the block began, on the clock of the events."""
        return self._recorder.begun_ns

    @property
    def seconds(self) -> float:
        """How long the block took; inside it, until now; 0 before it."""
        if not self.begun_ns:
            return 0.0
        return ((self._recorder.ended_ns or clock()) - self.begun_ns) / 1e9

    @property
    def dropped(self) -> int:
        """How many events came after `max_events` were kept."""
        return self._recorder.dropped

    def table(self) -> str:
        """The table as text: how often, how long, how many bytes, and what was waited for most."""
        return summary.as_text(self._rows(), self._notes())

    def __str__(self) -> str:
        return self.table()

    def __rich__(self) -> "Table":
        return summary.as_rich(self._rows(), self._notes())

    def __repr__(self) -> str:
        return f"<Observation of {len(self._recorder.events)} events in {self.seconds:.3f} s>"

    def _rows(self) -> list[summary.TableRow]:
        return summary.rows_of(self.events, self.seconds)

    def _notes(self) -> list[str]:
        if not self.begun_ns:
            return [_NOT_BEGUN]
        return summary.notes_on(self.events, self.seconds, self.dropped)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the timeline: `.json` for Perfetto and chrome://tracing, `.png` as a picture.

        A file that is there is replaced once the new one is whole.

        Raises:
            ArgumentError: another ending, no such folder, or a picture without matplotlib; or the
                block has not begun.
            OSError: it could not be written.
        """
        path = check_trace_path(path)
        if not self.begun_ns:
            raise ArgumentError(_NOT_BEGUN)
        partial = path.with_name(f"{path.name}.partial")
        try:
            _WRITERS[path.suffix.lower()](self, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def check_trace_path(path: Any) -> Path:  # whatever a user gives
    """The path, if `Observation.save` can write there; ArgumentError otherwise."""
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"a trace is saved to a path, not to {path!r}: give one")
    found = Path(os.fsdecode(path))
    if found.suffix.lower() not in _WRITERS:
        raise ArgumentError(
            f"{found}: a trace ends in .json (for Perfetto) or .png (a picture): rename it"
        )
    if found.is_dir() or not found.parent.is_dir():
        problem = "is a folder" if found.is_dir() else "has no folder to be in"
        raise ArgumentError(f"{found} {problem}: give a file in a folder that is there")
    if not os.access(found.parent, os.W_OK):
        raise ArgumentError(f"{found}: its folder may not be written to: give another one")
    if found.suffix.lower() == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError(
            f"{found} needs matplotlib: pip install matplotlib, or save to a .json file"
        )
    return found
