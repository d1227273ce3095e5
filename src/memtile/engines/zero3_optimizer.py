"""Reads and writes the state of torch's optimizer under ZeRO-3, parameter by parameter.

DeepSpeed gives the optimizer one flat tensor for a group of parameters: this rank's parts of them,
end to end. A moment has the same length, and the count of steps is one for the group.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from memtile.engines.optimizer_state import OptimizerState, State
from memtile.engines.zero3_values import (
    FlatSpan,
    flat_span,
    master_of,
    partition_like,
    write_masters,
)
from memtile.errors import CheckpointError, OptimizerError
from memtile.layers import whole_shape
from memtile.optim import DenseParameter, Part, stored_state
from memtile.optim.state_layout import MASTER

_WAY_OUT = "save and load it with engine.save_checkpoint and engine.load_checkpoint"


class PartitionedState(OptimizerState):
    """The state of torch's optimizer inside DeepSpeed's; both are the engine's."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:  # DeepSpeed's, without types
        _check_kind(optimizer)
        self._model, self._outer, self._optimizer = model, optimizer, optimizer.optimizer
        self._flats: list[Tensor] = optimizer.fp32_partitioned_groups_flat
        self._made: dict[tuple[int, str], Tensor] = {}
        self.groups = self._optimizer.param_groups
        own: list[dict[str, list[nn.Parameter]]] = [{"params": []} for _ in self.groups]
        for number, parameters in enumerate(optimizer.fp16_groups):
            own[optimizer.sub_group_to_group_id[number]]["params"] += parameters
        self.members = [
            {name: _whole(dense) for name, dense in found.items()}
            for found in stored_state.members(model, own)
        ]
        self._dense = {name: dense for found in self.members for name, dense in found.items()}
        self.by_parameter = {
            part.parameter: dict(self._entries(part.parameter))
            for dense in self._dense.values()
            for part in dense.parts
        }

    def check_savable(self) -> None:
        """Nothing more: it was checked when this was made."""

    def is_shaped(self, entry: object, parameter: Tensor) -> bool:
        """An entry that was cut like its parameter is marked as partitioned."""
        return hasattr(entry, "ds_id")

    def stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype of the master."""
        return self._flats[self._span(parameter).group].dtype

    def keeps(self, parameter: Tensor, key: str, stepped: torch.dtype) -> bool:
        """Everything is of use: there is a master for each parameter."""
        return True

    def room(self, part: Part, key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """This rank's part of an entry, to be read into; in place where there is one."""
        shape = whole_shape(part.parameter)
        if part.rect is None and size != shape:
            raise CheckpointError(
                f"{key!r} of the checkpoint is {tuple(size)}, the parameter {shape}: ZeRO-3 cuts "
                "it like the parameter; load under another engine"
            )
        group = self._span(part.parameter).group
        if (group, key) not in self._made:
            flat = self._flats[group]
            found = self._optimizer.state.get(flat, {}).get(key)
            is_alike = isinstance(found, Tensor) and found.shape == flat.shape
            if not is_alike or found.dtype != dtype:
                found = torch.zeros_like(flat, dtype=dtype)
            self._made[group, key] = found
        return self._part(part.parameter, self._made[group, key])

    def check_numbers(self, numbers: Mapping[str, State]) -> None:
        """Refuse saved numbers that are not the same for all that is stepped as one."""
        first: dict[tuple[int, str], tuple[str, object]] = {}
        for name, dense in self._dense.items():
            for key, value in numbers.get(name, {}).items():
                for group in {self._span(part.parameter).group for part in dense.parts}:
                    other, known = first.setdefault((group, key), (name, value))
                    if value != known:
                        raise OptimizerError(
                            f"{key!r} of {name} is {value} in the checkpoint, and {known} of "
                            f"{other}: DeepSpeed counts the steps of both as one; go on under the "
                            "engine that saved it, or load the model only"
                        )

    def zero_grad(self) -> None:
        """Drop gradients."""
        self._outer.zero_grad()

    def put(self, states: Mapping[Any, State]) -> None:
        """Replace all that is kept by these states of parameters; masters are copied into place.

        A parameter without a state gets zeros, as DeepSpeed gives to one without a gradient.
        """
        found: list[State] = [{} for _ in self._flats]
        for parameter in self.by_parameter:
            state = dict(states.get(parameter, {}))
            saved = state.pop(MASTER, None)
            if saved is not None:
                master = master_of(parameter)
                assert master is not None  # checked with its kind
                master.copy_(saved.ds_tensor)
            for key, value in state.items():
                group = self._span(parameter).group
                found[group][key] = self._made.get((group, key), value)
        for (group, key), made in self._made.items():
            for parameter in self._outer.fp16_groups[group]:
                if key not in states.get(parameter, {}):
                    self._span(parameter).of(made).zero_()
        for flat, state in zip(self._flats, found, strict=True):
            self._optimizer.state.pop(flat, None)
            if state:
                self._optimizer.state[flat] = state
        write_masters(self._model)

    def _entries(self, parameter: nn.Parameter) -> Iterator[tuple[str, Any]]:
        """What is kept for one parameter."""
        flat = self._flats[self._span(parameter).group]
        for key, entry in self._optimizer.state.get(flat, {}).items():
            if isinstance(entry, Tensor) and entry.dim() and entry.shape == flat.shape:
                yield key, self._part(parameter, entry)
            elif isinstance(entry, Tensor) and entry.numel() > 1:
                raise OptimizerError(
                    f"{self.class_name} keeps {key!r} of shape {tuple(entry.shape)} for all that "
                    f"ZeRO-3 has flattened into {flat.numel()} elements, of which there is no "
                    f"dense form; {_WAY_OUT}"
                )
            else:
                yield key, entry

    def _span(self, parameter: Any) -> FlatSpan:  # an nn.Parameter, with DeepSpeed's attributes
        return flat_span(self._outer, parameter)

    def _part(self, parameter: nn.Parameter, flat: Tensor) -> Tensor:
        return partition_like(parameter, self._span(parameter).of(flat))


def _check_kind(optimizer: Any) -> None:  # DeepSpeed's, without types
    """Refuse what is not all in memory, and what is not of torch's making."""
    inner = type(optimizer.optimizer)
    if inner.__module__.split(".")[0] == "deepspeed":
        raise OptimizerError(
            f"under ZeRO-3 the state of torch's optimizers can be saved under dense names, and "
            f"this is DeepSpeed's own {inner.__name__}; {_WAY_OUT}"
        )
    kinds = {
        "on NVMe": getattr(optimizer, "swap_optimizer", False),
        "in two optimizers, for two devices": hasattr(optimizer, "backup_optimizer"),
        "in ZenFlow's parts": getattr(optimizer, "zenflow", False),
        "offloaded for the time being": bool(getattr(optimizer, "offloaded_states", ())),
    }
    for kind, is_so in kinds.items():
        if is_so:
            raise OptimizerError(
                f"the optimizer's state is {kind}, where it has no dense form; {_WAY_OUT}"
            )


def _whole(dense: DenseParameter) -> DenseParameter:
    if dense.parts[0].rect is not None:
        return dense
    return replace(dense, shape=torch.Size(whole_shape(dense.parts[0].parameter)))
