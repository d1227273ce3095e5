"""The state of all generators of random numbers that a program has by itself: saved, and set."""

import random
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtile.checkpoints.exact_json import from_json, to_json
from memtile.checkpoints.opening import Checkpoint
from memtile.checkpoints.writing import Outgoing
from memtile.errors import CheckpointError

_CPU, _CUDA = "cpu", "cuda."


@dataclass(frozen=True)
class RandomState:
    """What Python's, numpy's and torch's own generators are at.

    Attributes:
        python: as `random.getstate` gives it.
        numpy: as `numpy.random.get_state` gives it, with lists for arrays; None where numpy is not
            loaded.
        torch: states of torch's generators, by device.
    """

    python: Any  # whatever Python's generator says
    numpy: Any  # whatever numpy's says
    torch: Mapping[str, Tensor]

    @classmethod
    def now(cls) -> "RandomState":
        """The state at this moment; CUDA's where CUDA is in use."""
        states = {_CPU: torch.get_rng_state()}
        if torch.cuda.is_initialized():
            states |= {f"{_CUDA}{n}": s for n, s in enumerate(torch.cuda.get_rng_state_all())}
        numpy = sys.modules.get("numpy")
        found = None if numpy is None else _plain(numpy.random.get_state(legacy=False))
        return cls(random.getstate(), found, states)

    def to_json(self) -> Any:  # any JSON
        """What goes into the record."""
        both = {"python": self.python, "numpy": self.numpy}
        return to_json(both, "the random state")

    def outgoing(self) -> list[Outgoing]:
        """What goes into a file of tensors."""
        return [Outgoing.of(name, state) for name, state in self.torch.items()]

    @classmethod
    def read(cls, found: Any, tensors: Checkpoint) -> "RandomState":  # any JSON
        """What was saved.

        Raises:
            CheckpointError: this torch has other generators than the one that saved it.
        """
        both = from_json(found)
        states = {name: tensor.read() for name, tensor in tensors.items()}
        ours, theirs = torch.get_rng_state(), states.get(_CPU)
        if theirs is None or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            raise CheckpointError(
                f"{tensors.path} holds no state of this torch's generator of random numbers; "
                "resume with the torch that saved it"
            )
        return cls(both["python"], both["numpy"], states)

    def restore(self) -> None:
        """Set the generators.

        Warns:
            UserWarning: some that were in use then are not there now.
        """
        random.setstate(self.python)
        numpy = sys.modules.get("numpy")
        if self.numpy is not None and numpy is not None:
            numpy.random.set_state(self.numpy)
        torch.set_rng_state(self.torch[_CPU])
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        wanting = [] if self.numpy is None or numpy is not None else ["numpy"]
        for name, state in self.torch.items():
            number = name.removeprefix(_CUDA)
            if name != _CPU and int(number) < count:
                torch.cuda.set_rng_state(state, int(number))
            elif name != _CPU:
                wanting.append(name)
        if wanting:
            warnings.warn(
                f"the checkpoint has random states of {', '.join(wanting)}, which this process has "
                "not: random numbers drawn there will be others than without the interruption",
                stacklevel=3,
            )


def _plain(state: Any) -> Any:  # what numpy's generators say of themselves, and the same as JSON
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state
