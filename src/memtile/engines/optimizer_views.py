"""An optimizer's state under dense names, for distributed checkpoints: out of it and into it.

The layout is that of `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`, so that an
untiled model's script reads it with torch's own functions.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from memtile.checkpoints.exact_json import from_json, to_json
from memtile.checkpoints.header import DTYPES, dtype_name
from memtile.convert.optimizer_file import OWN_OPTIONS, beside, entry_of
from memtile.engines.dense_views import view_of
from memtile.errors import CheckpointError
from memtile.optim import DenseParameter, Part, stored_state

Json = dict[str, Any]  # of the record: whatever JSON it has
State = dict[str, Any]  # of an optimizer: whatever its class keeps

KEY = "optimizer"


def outgoing_state(model: nn.Module, optimizer: Optimizer) -> tuple[State, Json]:
    """What is to be saved of an optimizer: its state in torch's layout, and a record to check by.

    Raises:
        OptimizerError: it is in the middle of a step, or there is no dense form of what it keeps.
        CheckpointError: an option of a group is neither a tensor of one element nor JSON.
    """
    stored_state.check_between_steps(optimizer)
    stored_state.check_keys(model, optimizer)
    state: State = {"state": {}, "param_groups": []}
    record: Json = {"class": stored_state.class_of(optimizer), "groups": [], "stepped": {}}
    named = stored_state.members(model, optimizer)
    for number, (group, found) in enumerate(zip(optimizer.param_groups, named, strict=True)):
        options = {key: value for key, value in group.items() if key not in OWN_OPTIONS}
        state["param_groups"].append({"params": list(found), **options})
        written = {
            key: to_json(value, f"the optimizer's param_groups[{number}][{key!r}]")
            for key, value in options.items()
        }
        record["groups"].append({"names": list(found), "options": written})
        for name, dense in found.items():
            kept = stored_state.kept_state(optimizer, dense)
            if kept is not None:
                state["state"][name] = {
                    **{
                        k: view_of(d, entry_of(optimizer.state, k)) for k, d in kept.tensors.items()
                    },
                    **kept.numbers,
                }
                stepped = stored_state.stepped_dtype(optimizer, dense.parts[0].parameter)
                record["stepped"][name] = dtype_name(stepped)
    return state, record


@dataclass
class IncomingState:
    """A saved state on its way into an optimizer: made, it was checked, and has changed nothing.

    Attributes:
        state: to be given to DCP under the name `KEY`.

    Raises:
        CheckpointError: it is of another optimizer, or of another model.
        OptimizerError: the optimizer is not of this model.
        HomeFullError: a home has no room for it.
    """

    record: Json
    metadata: Metadata
    model: nn.Module
    optimizer: Optimizer
    state: State = field(init=False, default_factory=lambda: {"state": {}})

    def __post_init__(self) -> None:
        self._states: dict[Any, State] = {}  # by parameters
        self._alike: list[tuple[DenseParameter, str]] = []
        members = stored_state.members(self.model, self.optimizer)
        self._check_class()
        self._check_groups([set(found) for found in members])
        stored = self._stored()
        for found in members:
            for name, dense in found.items():
                for key, entry in stored.get(name, {}).items():
                    self._prepare(dense, key, entry)

    def _check_class(self) -> None:
        ours, theirs = stored_state.class_of(self.optimizer), self.record["class"]
        if ours != theirs:
            raise CheckpointError(
                f"the checkpoint was trained with {theirs}, and this optimizer is {ours}: its "
                f"state means something else; load with {theirs}, or load the model only"
            )

    def _check_groups(self, ours: list[set[str]]) -> None:
        theirs = [set(group["names"]) for group in self.record["groups"]]
        if len(theirs) != len(ours):
            raise CheckpointError(
                f"the optimizer has {len(ours)} parameter groups, the checkpoint {len(theirs)}: "
                "make the groups as they were made for the run that saved it"
            )
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            for name in sorted(one ^ other):
                whose = "the optimizer" if name in one else "the checkpoint"
                raise CheckpointError(
                    f"only {whose} has {name!r} in group {number}: make the groups as they were "
                    "made for the run that saved it"
                )

    def _stored(self) -> dict[str, dict[str, TensorStorageMetadata | BytesStorageMetadata]]:
        """What the checkpoint has of each parameter."""
        found: dict[str, dict[str, TensorStorageMetadata | BytesStorageMetadata]] = {}
        for flat, path in (self.metadata.planner_data or {}).items():
            if path[:2] == (KEY, "state"):
                found.setdefault(path[2], {})[path[3]] = self.metadata.state_dict_metadata[flat]
        return found

    def _prepare(
        self, dense: DenseParameter, key: str, entry: TensorStorageMetadata | BytesStorageMetadata
    ) -> None:
        """Make room for one entry, in each part's new state and for DCP."""
        stepped = DTYPES[self.record["stepped"][dense.name]]
        if not stored_state.keeps(self.optimizer, dense.parts[0].parameter, key, stepped):
            return
        entries = self.state["state"].setdefault(dense.name, {})
        if isinstance(entry, BytesStorageMetadata):
            entries[key] = None
            self._alike.append((dense, key))
        elif (entry.size.numel() <= 1 and entry.size != dense.shape) or not entry.size:
            entries[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
            self._alike.append((dense, key))
        else:
            dtype = entry.properties.dtype
            if dtype == stepped:
                dtype = stored_state.stepped_dtype(self.optimizer, dense.parts[0].parameter)
            self._check_shape(dense, key, entry.size)
            for part in dense.parts:
                room = self._room(part, key, entry.size, dtype)
                self._states.setdefault(part.parameter, {})[key] = room
            entries[key] = view_of(dense, entry_of(self._states, key))

    def _check_shape(self, dense: DenseParameter, key: str, size: torch.Size) -> None:
        if dense.parts[0].rect is not None and size != dense.shape:
            raise CheckpointError(
                f"{dense.name}: {key!r} of the checkpoint is {tuple(size)}, the parameter "
                f"{tuple(dense.shape)}: it cannot be cut along tiles; load with this layer untiled"
            )

    def _room(self, part: Part, key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        parameter: Tensor = part.parameter
        shape = size if part.rect is None else parameter.shape
        if isinstance(parameter, DTensor) and shape == parameter.shape:
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        return stored_state.room_for(self.optimizer, parameter, key, shape, dtype)

    def take(self) -> None:
        """Put what DCP has read into the optimizer, options of groups too; drop gradients."""
        self.optimizer.zero_grad()
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for dense, key in self._alike:
            value = self.state["state"][dense.name][key]
            for part in dense.parts:
                group = groups[id(part.parameter)]
                self._states.setdefault(part.parameter, {})[key] = _own(value, part, group)
        for own, saved in zip(self.optimizer.param_groups, self.record["groups"], strict=True):
            for option, value in from_json(saved["options"]).items():
                own[option] = beside(own.get(option), value)
        self.optimizer.state.clear()
        self.optimizer.state.update(self._states)


def _own(value: object, part: Part, group: Mapping[str, Any]) -> object:
    """A part's own copy of a number; on its device where the step wants it there."""
    if isinstance(value, Tensor) and (group.get("capturable") or group.get("fused")):
        return value.to(part.parameter.device, copy=True)
    return copy.deepcopy(value)
