"""Which tiles can lie in the files of a checkpoint, and where the others go."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from memtile.checkpoints import CheckpointHome, StoredTensor
from memtile.convert.finding import Match
from memtile.convert.moving import first_element
from memtile.homes import Berth, DiskHome, whole_pages
from memtile.layers import ParkedModule
from memtile.optim import Part

_log = logging.getLogger("memtile.checkpoints")

Resting = Mapping[int, Berth]  # by the id of the parameter on the meta device


def rest_in_files(model: nn.Module, matches: Iterable[Match], home: CheckpointHome) -> Resting:
    """The stretches of the files that tiles lie in; a new disk home is made for the others.

    Only rows of a tensor of the model's own dtype are a stretch of its file. Columns, transposed
    linears and tensors that must be converted are streamed to the disk home, in the first usable
    folder for temporary files.

    Raises:
        HomeFullError: it has no room for them, or a file cannot be mapped.
        HomeError: no folder is usable.
    """
    parked = {
        id(module._parameters["weight"]): module
        for module in model.modules()
        if isinstance(module, ParkedModule) and module.home is home
    }
    resting: dict[int, Berth] = {}
    reasons: Counter[str] = Counter()
    for match in matches:
        for part in match.dense.parts:
            if id(part.parameter) in parked:
                found = _place(match, part, home)
                if isinstance(found, str):
                    reasons[found] += 1
                else:
                    resting[id(part.parameter)] = found
    for reason, count in reasons.items():
        _log.info("%d tiles are copied to a home on disk: %s", count, reason)
    if reasons:
        _move_others(model, home, resting)
    return resting


def _place(match: Match, part: Part, home: CheckpointHome) -> Berth | str:
    """Where a tile lies in the files, or the reason why it does not."""
    if not isinstance(match.source, StoredTensor):
        return "the checkpoint holds them in tiles of its own"
    start = first_element(match.dense, part)
    if start is None:
        return "they are no whole rows of what the checkpoint holds"
    if match.source.dtype != part.parameter.dtype:
        return f"the checkpoint's are {match.source.dtype}, the model's {part.parameter.dtype}"
    return home.rows_of(match.source, start, part.parameter.shape)


def _move_others(model: nn.Module, home: CheckpointHome, resting: Resting) -> None:
    """Give the tiles that lie in no file another home, with room for all of them."""
    others = [
        module
        for module in model.modules()
        if isinstance(module, ParkedModule)
        and module.home is home
        and id(module._parameters["weight"]) not in resting
    ]
    weights = {id(m._parameters["weight"]): m._parameters["weight"] for m in others}
    disk = DiskHome()
    disk.hold([whole_pages(w.nbytes) for w in weights.values() if w is not None])
    for module in others:
        module.home = disk
