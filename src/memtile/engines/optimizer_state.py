"""An optimizer's state under dense names, for distributed checkpoints: out of it and into it.

The layout is that of `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`, so that an
untiled model's script reads it with torch's own functions.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from memtile.checkpoints.header import DTYPES, dtype_name
from memtile.convert.optimizer_file import (
    OWN_OPTIONS,
    Members,
    check_same_optimizer,
    entry_of,
    group_records,
    take_options,
)
from memtile.engines.dense_views import view_of
from memtile.errors import CheckpointError
from memtile.optim import DenseParameter, Part, dense_parameters, state_layout, stored_state

State = dict[str, Any]  # of an optimizer: whatever its class keeps
Json = dict[str, Any]  # of the record: whatever JSON it has
_StoredMetadata: TypeAlias = TensorStorageMetadata | BytesStorageMetadata

KEY = "optimizer"


class OptimizerState:
    """What torch's optimizers and `TileOptimizer` keep for a model's parameters.

    Attributes:
        groups: the optimizer's own, whose options are to be saved and replaced.
        members: the dense parameters of each group by their names.
        by_parameter: what is kept for each parameter.
    """

    groups: Sequence[State]
    members: Members
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
        """Raise OptimizerError in the middle of a step, or where it keeps state of no parameter."""
        stored_state.check_between_steps(self._optimizer)
        stored_state.check_keys(self._model, self._optimizer)

    def is_shaped(self, entry: object, parameter: Tensor) -> bool:
        """Whether an entry has an element for each of a parameter's."""
        return state_layout.is_shaped(entry, parameter)

    def stepped_dtype(self, parameter: Tensor) -> torch.dtype:
        """The dtype that a parameter is stepped in, and its moments have."""
        return stored_state.stepped_dtype(self._optimizer, parameter)

    def keeps(self, parameter: Tensor, key: str, stepped: torch.dtype) -> bool:
        """Whether an entry is of use that was stored where parameters were stepped in a dtype."""
        return stored_state.keeps(self._optimizer, parameter, key, stepped)

    def room(self, part: Part, key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor to read a part of an entry of this dense size into; or HomeFullError."""
        parameter: Tensor = part.parameter
        shape = size if part.rect is None else parameter.shape
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return stored_state.room_for(self._optimizer, parameter, key, shape, dtype)

    def zero_grad(self) -> None:
        """Drop gradients."""
        self._optimizer.zero_grad()

    def put(self, states: Mapping[Any, State]) -> None:
        """Replace all that is kept by these states of parameters."""
        self._optimizer.state.clear()
        self._optimizer.state.update(states)


def outgoing_state(kept_by: OptimizerState) -> tuple[State, Json]:
    """An optimizer's state in torch's layout, and a record to check by."""
    kept_by.check_savable()
    groups = group_records(kept_by.groups, kept_by.members)
    state: State = {"state": {}, "param_groups": []}
    record: Json = {"class": kept_by.class_name, "groups": groups, "stepped": {}}
    for group, found in zip(kept_by.groups, kept_by.members, strict=True):
        options = {key: value for key, value in group.items() if key not in OWN_OPTIONS}
        state["param_groups"].append({"params": list(found), **options})
        for name, dense in found.items():
            kept = stored_state.kept_state(kept_by.by_parameter, dense, kept_by.is_shaped)
            if kept is None:  # before its first step
                continue
            views = {
                key: view_of(of, entry_of(kept_by.by_parameter, key))
                for key, of in kept.tensors.items()
            }
            state["state"][name] = {**views, **kept.numbers}
            stepped = kept_by.stepped_dtype(dense.parts[0].parameter)
            record["stepped"][name] = dtype_name(stepped)
    return state, record


class OptimizerStateLoader:
    """Loads a saved state into an optimizer: made, it is checked; only `take` changes anything.

    Attributes:
        state: to be given to DCP under the name `KEY`.
    """

    def __init__(
        self,
        record: Json,
        metadata: Metadata,
        model: nn.Module,
        kept_by: OptimizerState,
        place: Path,
    ) -> None:
        self.state: State = {"state": {}}
        self._record, self._kept_by = record, kept_by
        self._states: dict[Any, State] = {}  # by parameters
        self._numbers: list[tuple[DenseParameter, str]] = []
        stored: dict[str, dict[str, _StoredMetadata]] = {}  # by dense names
        for flat, path in (metadata.planner_data or {}).items():
            if path[:2] == (KEY, "state"):
                stored.setdefault(path[2], {})[path[3]] = metadata.state_dict_metadata[flat]
        frozen = {
            dense.name
            for dense in dense_parameters(model)
            if not any(part.parameter.requires_grad for part in dense.parts)
        }
        ignored = frozen - stored.keys()  # a frozen parameter that was never stepped
        check_same_optimizer(kept_by.class_name, kept_by.members, record, place, ignored)
        for found in kept_by.members:
            for name, dense in found.items():
                for key, entry in stored.get(name, {}).items():
                    self._prepare(dense, key, entry)

    def _prepare(self, dense: DenseParameter, key: str, entry: _StoredMetadata) -> None:
        """Make room for one entry, in each part's new state and for DCP."""
        stepped = DTYPES[self._record["stepped"][dense.name]]
        if not self._kept_by.keeps(dense.parts[0].parameter, key, stepped):
            return
        entries = self.state["state"].setdefault(dense.name, {})
        if isinstance(entry, BytesStorageMetadata):
            entries[key] = None
            self._numbers.append((dense, key))
        elif (entry.size.numel() <= 1 and entry.size != dense.shape) or not entry.size:
            entries[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
            self._numbers.append((dense, key))
        else:
            dtype = entry.properties.dtype
            if dtype == stepped:
                dtype = self._kept_by.stepped_dtype(dense.parts[0].parameter)
            if dense.parts[0].rect is not None and entry.size != dense.shape:
                raise CheckpointError(
                    f"{dense.name}: {key!r} of the checkpoint is {tuple(entry.size)}, the "
                    f"parameter {tuple(dense.shape)}: it cannot be cut along tiles; load with this "
                    "layer untiled"
                )
            for part in dense.parts:
                room = self._kept_by.room(part, key, entry.size, dtype)
                self._states.setdefault(part.parameter, {})[key] = room
            entries[key] = view_of(dense, entry_of(self._states, key))

    def numbers(self) -> State:
        """What is one number for a whole parameter, by dense names: to be read as DCP does."""
        numbers: State = {}
        for dense, key in self._numbers:
            numbers.setdefault(dense.name, {})[key] = self.state["state"][dense.name][key]
        return numbers

    def take(self) -> None:
        """Put what DCP has read into the optimizer, options of groups too; drop gradients."""
        self._kept_by.zero_grad()
        groups = {
            name: group
            for group, found in zip(self._kept_by.groups, self._kept_by.members, strict=True)
            for name in found
        }
        for dense, key in self._numbers:
            value, group = self.state["state"][dense.name][key], groups[dense.name]
            on_device = group.get("capturable") or group.get("fused")
            for part in dense.parts:
                own = copy.deepcopy(value)
                if isinstance(own, Tensor) and on_device:
                    own = own.to(part.parameter.device)
                self._states.setdefault(part.parameter, {})[key] = own
        take_options(self._kept_by.groups, self._record)
        self._kept_by.put(self._states)
