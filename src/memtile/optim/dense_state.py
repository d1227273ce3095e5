"""An optimizer's state dict over the dense model: joined from the tiles' states, and split again.

Each state tensor of a weight's tiles becomes one tensor of the dense shape, under the index that
the dense parameter has in the dense model.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memtile.errors import OptimizerError
from memtile.geometry import Rect
from memtile.homes import allocate_copy, evict, reservation_of, streamed_allocation, tensor_of
from memtile.optim.state_layout import equal, is_shaped

Index = tuple[int, int]
ParamGroup = dict[str, Any]  # torch's own: holds whatever the optimizer's class wants
StateDict = dict[str, Any]  # a state dict of an optimizer, as torch writes it


@runtime_checkable
class TiledLayer(Protocol):
    """What is asked of a tiled layer; optim imports no layer."""

    weight_is_transposed: bool

    def tile_parameters(self, name: str) -> dict[Index, nn.Parameter]:
        """The tiles' parameters called `name`, by their index in the grid."""

    def tile_rect(self, name: str, index: Index) -> Rect:
        """The tile's rectangle in the dense parameter; a bias is one column."""

    def dense_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the dense parameter."""

    def dense_name(self, path: str, own: str) -> str:
        """The name of the dense parameter of a layer that stands at `path`."""


@dataclass(frozen=True)
class Part:
    """A parameter of the model, and its rectangle in a dense matrix; None: it is all of it.

    `transposed`: the dense tensor is the matrix transposed. A dense stack (E, R, C) is the matrix
    (E·R, C).
    """

    parameter: nn.Parameter
    rect: Rect | None = None
    transposed: bool = False

    def view(self, dense: Tensor) -> Tensor:
        """The view of this part in a tensor of the dense shape."""
        if self.rect is None:
            return dense
        if dense.dim() == 1:
            return dense[self.rect.index[0]]
        if dense.dim() == 3:  # a stack: its matrices one below another
            return dense.flatten(0, 1)[self.rect.index]
        return (dense.t() if self.transposed else dense)[self.rect.index]


@dataclass(frozen=True)
class DenseParameter:
    """A parameter of the dense model: its name, its shape, and the parameters that hold it."""

    name: str
    shape: torch.Size
    parts: tuple[Part, ...]


def with_groups(groups: Iterable[ParamGroup]) -> Iterator[tuple[nn.Parameter, ParamGroup]]:
    """Each parameter of these groups, and the group that it is in."""
    return ((parameter, group) for group in groups for parameter in group["params"])


def dense_parameters(model: nn.Module) -> list[DenseParameter]:
    """The parameters of the dense model, in its order."""
    seen: set[nn.Parameter] = set()
    found = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = module.named_parameters(recurse=False)
        dense_own = [DenseParameter(prefix + name, p.shape, (Part(p),)) for name, p in own]
        for dense in [*_joined(path, module), *_of_owner(prefix, module), *dense_own]:
            if dense.parts[0].parameter not in seen:
                seen.update(part.parameter for part in dense.parts)
                found.append(dense)
    return found


def _joined(path: str, module: nn.Module) -> Iterator[DenseParameter]:
    if not isinstance(module, TiledLayer):
        return
    for name in ("weight", "bias"):
        tiles = module.tile_parameters(name)
        transposed = name == "weight" and module.weight_is_transposed
        parts = tuple(Part(p, module.tile_rect(name, i), transposed) for i, p in tiles.items())
        if parts:
            dense_name, shape = module.dense_name(path, name), torch.Size(module.dense_shape(name))
            yield DenseParameter(dense_name, shape, parts)


def _of_owner(prefix: str, module: nn.Module) -> Iterator[DenseParameter]:
    """Of a module whose stacks of experts are tiles, in children, what it has in its own order."""
    for name in getattr(module, "dense_names", ()):
        if name in module._modules:
            yield from _joined(prefix + name, module.get_submodule(name))
        elif (parameter := module._parameters.get(name)) is not None:
            yield DenseParameter(prefix + name, parameter.shape, (Part(parameter),))


def by_group(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> list[list[DenseParameter]]:
    """The dense parameters of each group, in order; those that are not the model's have name "".

    OptimizerError where a group holds some tiles of a weight and not all.
    """
    known = dense_parameters(model)
    of = {part.parameter: dense for dense in known for part in dense.parts}
    places = {id(dense): place for place, dense in enumerate(known)}
    in_model = {parameter: place for place, parameter in enumerate(model.parameters())}
    result = []
    for number, group in enumerate(groups):
        held = set(group["params"])
        ordered: dict[int, DenseParameter] = {}
        for parameter in group["params"]:
            dense = of.get(parameter) or DenseParameter("", parameter.shape, (Part(parameter),))
            if not all(part.parameter in held for part in dense.parts):
                raise OptimizerError(
                    f"group {number} holds some tiles of {dense.name} and not all, so there is no "
                    "dense state of it; put all tiles of a weight into one group"
                )
            ordered.setdefault(id(dense.parts[0].parameter), dense)
        members = list(ordered.values())
        found = [in_model.get(parameter, -1) for parameter in group["params"]]
        if -1 not in found and found == sorted(found):  # as model.parameters() gives them
            members.sort(key=lambda dense: places[id(dense)])
        result.append(members)
    return result


def to_dense_state(
    model: nn.Module, states: Mapping[Tensor, dict[str, Any]], groups: Sequence[ParamGroup]
) -> StateDict:
    """The state dict over the dense model, joined from the tiles' states."""
    result: StateDict = {"state": {}, "param_groups": []}
    numbers = count()
    for own, members in zip(groups, by_group(model, groups), strict=True):
        numbered = {next(numbers): dense for dense in members}
        result["param_groups"].append({**own, "params": list(numbered)})
        for number, dense in numbered.items():
            held = (part.parameter for part in dense.parts)
            kept = {each: states[each] for each in held if states.get(each)}
            if kept:
                result["state"][number] = _join(dense, kept)
    return result


def _join(dense: DenseParameter, states: Mapping[nn.Parameter, Any]) -> dict[str, Any]:
    if len(dense.parts) == 1 and dense.parts[0].rect is None:
        return dict(states[dense.parts[0].parameter])
    if len(states) < len(dense.parts):
        raise OptimizerError(
            f"{dense.name}: {len(states)} of its {len(dense.parts)} tiles have been stepped, so "
            "there is no dense state of it yet; step the others too"
        )
    first = states[dense.parts[0].parameter]
    for key, entry in first.items():
        own = (states[part.parameter].get(key) for part in dense.parts)
        if not is_shaped(entry, dense.parts[0].parameter) and not all(equal(entry, e) for e in own):
            raise uneven(dense, key)
    return {
        key: _joined_entry(dense, key, entry, states)
        if is_shaped(entry, dense.parts[0].parameter)
        else copy.deepcopy(entry)
        for key, entry in first.items()
    }


def uneven(dense: DenseParameter, key: str) -> OptimizerError:
    """The error for tiles of which some were stepped more often than others."""
    return OptimizerError(
        f"{dense.name}: {key!r} is not the same for all of its tiles, since some were stepped more "
        "often than others, so there is no dense state of it; give all of them a gradient before "
        "each step. Experts are stepped equally often with TileOptimizer(…, idle='replay'); of a "
        "run with idle='skip' only the weights can be saved, with memtile.save_checkpoint"
    )


def _joined_entry(
    dense: DenseParameter, key: str, like: Tensor, states: Mapping[nn.Parameter, Any]
) -> Tensor:
    allocation = streamed_allocation(like)
    if allocation is None:
        out = torch.empty(dense.shape, dtype=like.dtype, device=like.device)
    else:
        out = tensor_of(allocation.home.allocate(dense.shape, like.dtype))
    for part in dense.parts:
        entry = states[part.parameter][key]
        part.view(out).copy_(entry)
        evict(entry)
        evict(out)
    return out


def load_dense_state(
    optimizer: Optimizer,
    model: nn.Module,
    state_dict: StateDict,
    stepped_dtype: Callable[[Tensor], torch.dtype],
) -> None:
    """Cut a state dict over the dense model into the optimizer's `state` and `param_groups`.

    `stepped_dtype` gives the dtype of a parameter's state. Nothing is changed by one that does not
    fit.
    """
    numbered = _checked(state_dict, by_group(model, optimizer.param_groups))
    states: dict[Tensor, dict[str, Any]] = {}
    for dense, number in numbered:
        if number in state_dict["state"]:
            entries = state_dict["state"][number].items()
            for part in dense.parts:
                dtype = stepped_dtype(part.parameter)
                states[part.parameter] = {k: _cut(dense, part, v, dtype) for k, v in entries}
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        own.update(copy.deepcopy({k: v for k, v in saved.items() if k != "params"}))
    optimizer.state.clear()
    optimizer.state.update(states)


def _checked(
    state_dict: StateDict, members: list[list[DenseParameter]]
) -> list[tuple[DenseParameter, Any]]:
    """Each dense parameter with its index in a state dict that fits."""
    if not {"state", "param_groups"} <= state_dict.keys():
        raise OptimizerError(
            f"a dictionary of {sorted(map(str, state_dict))[:4]} is no state dict of an optimizer, "
            "which has 'state' and 'param_groups'; give what optimizer.state_dict() gave"
        )
    theirs = [len(group["params"]) for group in state_dict["param_groups"]]
    ours = [len(group) for group in members]
    if theirs != ours:
        raise OptimizerError(
            f"the state dict has {theirs} parameters in its groups, the dense model {ours}: it is "
            "of another model, or its groups were made otherwise; load it where it was saved"
        )
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    numbered = list(zip(chain(*members), numbers, strict=True))
    for dense, number in numbered:
        for key, entry in state_dict["state"].get(number, {}).items():
            if isinstance(entry, Tensor) and entry.numel() > 1 and entry.shape != dense.shape:
                raise OptimizerError(
                    f"{dense.name}: the state dict's {key} is {tuple(entry.shape)}, the "
                    f"parameter {tuple(dense.shape)}: it is of another model"
                )
    return numbered


def _cut(dense: DenseParameter, part: Part, entry: Any, dtype: torch.dtype) -> Any:
    """One part's share of a state entry, in the part's home; other entries are copied."""
    if not isinstance(entry, Tensor) or entry.shape != dense.shape or not entry.dim():
        return copy.deepcopy(entry)
    share = part.view(entry.detach())
    if share.is_floating_point():
        share = share.to(dtype)
    allocation = streamed_allocation(part.parameter)
    if allocation is not None:
        with reservation_of(part.parameter):
            return allocate_copy(allocation.home, share)
    return share.to(part.parameter.device).clone(memory_format=torch.contiguous_format)


def through_hooks(
    hooks: Mapping[int, Any], optimizer: Optimizer, state_dict: dict[str, Any]
) -> dict[str, Any]:
    """The state dict as the hooks leave it: each may change it, or give another one."""
    for hook in hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    return state_dict
