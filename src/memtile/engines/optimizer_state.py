"""What an optimizer keeps for a model's parameters, as a distributed checkpoint sees it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from memtile.optim import DenseParameter, Part, stored_state

State = dict[str, Any]  # of an optimizer: whatever its class keeps


class OptimizerState:
    """The state of torch's optimizers and of `TileOptimizer`.

    Args:
        model: whose parameters are stepped.
        optimizer: that steps them.

    Attributes:
        groups: the optimizer's own, whose options are to be saved and replaced.
        members: the dense parameters of each group by their names.
        by_parameter: what is kept for each parameter.

    Raises:
        OptimizerError: the optimizer is not of this model.
    """

    groups: Sequence[State]
    members: Sequence[Mapping[str, DenseParameter]]
    by_parameter: Mapping[Any, State]

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self.groups = optimizer.param_groups
        self.members = stored_state.members(model, optimizer.param_groups)
        self.by_parameter = optimizer.state

    @property
    def class_name(self) -> str:
        """Of the class whose rule is applied."""
        return stored_state.class_of(self._optimizer)

    def check_savable(self) -> None:
        """Refuse what is of no moment, or of no parameter.

        Raises:
            OptimizerError: the optimizer is in the middle of a step, or keeps more.
        """
        stored_state.check_between_steps(self._optimizer)
        stored_state.check_keys(self._model, self._optimizer)

    def kept(self, dense: DenseParameter) -> stored_state.KeptState | None:
        """What is kept for a dense parameter; None before its first step.

        Raises:
            OptimizerError: there is no dense form of it.
        """
        return stored_state.kept_state(self.by_parameter, dense)

    def stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype that a parameter is stepped in, and its moments have."""
        return stored_state.stepped_dtype(self._optimizer, parameter)

    def keeps(self, parameter: Tensor, key: str, stepped: torch.dtype) -> bool:
        """Whether an entry is of use that was stored where parameters were stepped in a dtype."""
        return stored_state.keeps(self._optimizer, parameter, key, stepped)

    def room(self, part: Part, key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor for a part of an entry of this dense size, to be read into.

        Raises:
            HomeFullError: there is no room.
        """
        parameter: Tensor = part.parameter
        shape = size if part.rect is None else parameter.shape
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return stored_state.room_for(self._optimizer, parameter, key, shape, dtype)

    def zero_grad(self) -> None:
        """Drop gradients."""
        self._optimizer.zero_grad()

    def put(self, states: Mapping[Any, State]) -> None:
        """Let these states of parameters be all that is kept."""
        self._optimizer.state.clear()
        self._optimizer.state.update(states)
