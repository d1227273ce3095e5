"""An optimizer's state into a checkpoint and back, tensor by tensor."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memtile.checkpoints import Checkpoint, Outgoing, StoredTensor
from memtile.checkpoints.exact_json import from_json, to_json
from memtile.checkpoints.header import DTYPES, dtype_name
from memtile.convert.streaming import Held, bring_in, outgoing
from memtile.errors import CheckpointError
from memtile.homes import trim_heap
from memtile.optim import DenseParameter, Part, stored_state
from memtile.optim.stored_state import KeptState
from memtile.transfer import catch_up

Json = dict[str, Any]  # of the record: whatever JSON it has

Members = Sequence[Mapping[str, DenseParameter]]  # of each group, by dense names

OWN_OPTIONS = frozenset({"params", "param_names"})  # names of tiles, which depend on the grid


def optimizer_record(model: nn.Module, optimizer: Optimizer) -> tuple[Json, list[Outgoing]]:
    """What the record says of an optimizer, and the tensors to write beside it."""
    stored_state.check_between_steps(optimizer)
    stored_state.check_keys(model, optimizer)
    catch_up(model.parameters())
    tensors: list[Outgoing] = []
    states = {}
    members = stored_state.members(model, optimizer.param_groups)
    for found in members:
        for name, dense in found.items():
            kept = stored_state.kept_state(optimizer.state, dense)
            if kept is not None:
                states[name] = _entries(optimizer, kept)
                for key, tensor in kept.tensors.items():
                    held = entry_of(optimizer.state, key)
                    tensors.append(outgoing(tensor, f"{key}/{dense.name}", held))
    groups = group_records(optimizer.param_groups, members)
    record = {"class": stored_state.class_of(optimizer), "groups": groups, "state": states}
    return record, tensors


def group_records(groups: Sequence[Json], members: Members) -> list[Json]:
    """What the record says of an optimizer's groups: options, and dense names of parameters."""
    return [
        {
            "options": {
                key: to_json(value, f"the optimizer's param_groups[{number}][{key!r}]")
                for key, value in group.items()
                if key not in OWN_OPTIONS
            },
            "names": list(found),
        }
        for number, (group, found) in enumerate(zip(groups, members, strict=True))
    ]


def check_same_optimizer(
    class_name: str,
    members: Members,
    record: Json,
    place: Path,
    ignored: Set[str] = frozenset(),
) -> None:
    """Raise CheckpointError where a record is of another class or of other groups."""
    if class_name != record["class"]:
        raise CheckpointError(
            f"the checkpoint {place} was trained with {record['class']}, and this optimizer is "
            f"{class_name}: its state means something else; resume with {record['class']}, or "
            "load only the weights"
        )
    theirs = [set(group["names"]) for group in record["groups"]]
    ours = [set(found) for found in members]
    if len(theirs) != len(ours):
        raise CheckpointError(
            f"the optimizer has {len(ours)} parameter groups, the checkpoint {place} has "
            f"{len(theirs)}: make the groups as they were made for the run that saved it"
        )
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for name in sorted((one ^ other) - ignored):
            whose = "the optimizer" if name in one else f"the checkpoint {place}"
            raise CheckpointError(
                f"only {whose} has {name} in group {number}: give the optimizer the parameters "
                "that it had in the run that was saved, in the same groups"
            )


def take_options(groups: Sequence[Json], record: Json) -> None:
    """Put saved options into groups; a tensor goes to the device of the one that it replaces."""
    for group, saved in zip(groups, record["groups"], strict=True):
        for key, new in from_json(saved["options"]).items():
            old = group.get(key)
            if isinstance(old, Tensor) and isinstance(new, Tensor):
                new = new.to(old.device)
            group[key] = new


def _entries(optimizer: Optimizer, kept: KeptState) -> Json:
    parameter = kept.dense.parts[0].parameter
    entries: Json = {}
    for key in kept.keys:
        if key in kept.tensors:
            is_whole = kept.tensors[key] is not kept.dense
            entries[key] = {"tensor": f"{key}/{kept.dense.name}", "own_shape": is_whole}
        else:
            value = kept.numbers[key]
            where = f"the optimizer's state of {kept.dense.name}[{key!r}]"
            on_device = isinstance(value, Tensor) and not value.is_cpu
            entries[key] = {"value": to_json(value, where), "on_device": on_device}
    stepped = stored_state.stepped_dtype(optimizer, parameter)
    return {"stepped": dtype_name(stepped), "entries": entries}


def entry_of(states: Mapping[Tensor, Mapping[str, Any]], key: str) -> Held:
    """What is kept under a key for each part."""

    def held(part: Part) -> Tensor:
        tensor = states[part.parameter][key]
        assert isinstance(tensor, Tensor)
        return tensor

    return held


class IncomingState:
    """A stored state for an optimizer: making it checks everything, and changes nothing."""

    def __init__(
        self, record: Json, tensors: Checkpoint, model: nn.Module, optimizer: Optimizer
    ) -> None:
        self._record, self._tensors, self._optimizer = record, tensors, optimizer
        self._place = tensors.path.parent
        self._members = stored_state.members(model, optimizer.param_groups)
        name = stored_state.class_of(optimizer)
        check_same_optimizer(name, self._members, record, tensors.path.parent)
        self._flows: list[tuple[DenseParameter, StoredTensor, str]] = []
        self._states: dict[Tensor, dict[str, Any]] = {}
        for group, found in zip(optimizer.param_groups, self._members, strict=True):
            for name, dense in found.items():
                if name in record["state"]:
                    self._prepare(dense, record["state"][name], group)

    def _check_class(self) -> None:
        ours, theirs = stored_state.class_of(self._optimizer), self._record["class"]
        if ours != theirs:
            raise CheckpointError(
                f"the checkpoint {self._place} was trained with {theirs}, and this optimizer is "
                f"{ours}: its state means something else; resume with {theirs}, or load only the "
                "weights"
            )

    def _check_groups(self) -> None:
        theirs = [set(group["names"]) for group in self._record["groups"]]
        ours = [set(found) for found in self._members]
        if len(theirs) != len(ours):
            raise CheckpointError(
                f"the optimizer has {len(ours)} parameter groups, the checkpoint {self._place} has "
                f"{len(theirs)}: make the groups as they were made for the run that saved it"
            )
        for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            for name in sorted(one ^ other):
                whose = "the optimizer" if name in one else f"the checkpoint {self._place}"
                raise CheckpointError(
                    f"only {whose} has {name} in group {number}: give the optimizer the parameters "
                    "that it had in the run that was saved, in the same groups"
                )

    def _prepare(self, dense: DenseParameter, saved: Json, group: Mapping[str, Any]) -> None:
        """Make room for the tensors of one dense parameter; take its numbers."""
        stepped = DTYPES[saved["stepped"]]
        for part in dense.parts:
            self._states[part.parameter] = {}
        for key, entry in saved["entries"].items():
            if not stored_state.keeps(self._optimizer, dense.parts[0].parameter, key, stepped):
                continue
            if "tensor" in entry:
                self._prepare_tensor(dense, key, entry, stepped)
                continue
            for part in dense.parts:
                number = _number(entry, part.parameter, group)
                self._states[part.parameter][key] = number

    def _prepare_tensor(
        self, dense: DenseParameter, key: str, entry: Json, stepped: torch.dtype
    ) -> None:
        stored, first = self._tensors[entry["tensor"]], dense.parts[0]
        dtype, target = stored.dtype, dense
        if entry["own_shape"]:
            if first.rect is not None:
                raise CheckpointError(
                    f"{dense.name} is tiled now, and {key!r} of the checkpoint {self._place} has a "
                    f"shape of its own, {tuple(stored.shape)}, that cannot be cut along tiles; "
                    "resume with this layer as it was"
                )
            target = DenseParameter(dense.name, stored.shape, (Part(first.parameter),))
        elif stored.shape != dense.shape:
            raise CheckpointError(
                f"{dense.name}: {key!r} of the checkpoint {self._place} is "
                f"{tuple(stored.shape)}, the parameter {tuple(dense.shape)}: it is of another model"
            )
        elif dtype == stepped:
            dtype = stored_state.stepped_dtype(self._optimizer, first.parameter)
        for part in target.parts:
            shape = stored.shape if entry["own_shape"] else part.parameter.shape
            room = stored_state.room_for(self._optimizer, part.parameter, key, shape, dtype)
            self._states[part.parameter][key] = room
        self._flows.append((target, stored, key))

    def take(self) -> None:
        """Put the state and the groups' options into the optimizer; gradients are dropped."""
        self._optimizer.zero_grad()
        for target, stored, key in self._flows:
            bring_in(target, stored, entry_of(self._states, key))
            trim_heap()  # holes that the pieces left grew the peak from 16 to 50 MiB, measured
        take_options(self._optimizer.param_groups, self._record)
        begun = dict(self._optimizer.state)
        self._optimizer.state.clear()
        self._optimizer.state.update({p: state for p, state in begun.items() if _is_new(state)})
        self._optimizer.state.update(self._states)


def _is_new(state: Mapping[str, Any]) -> bool:
    """Whether the constructor made it, as Adagrad's does, and no step has changed it."""
    return "step" in state and float(state["step"]) == 0


def _number(entry: Json, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    """A number of a state, on the parameter's device where the step needs it there."""
    value = from_json(entry["value"])
    needed = entry["on_device"] or group.get("capturable") or group.get("fused")
    return value.to(parameter.device) if isinstance(value, Tensor) and needed else value
