"""An optimizer's state for each dense parameter, as checkpoints store it. Opens no file.

Tensors of a parameter's shape are in parts, one for each tile, and are streamed. Anything else,
step counters for the most part, must be equal for all tiles of a weight.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memtile.errors import OptimizerError
from memtile.homes import allocation_of, reservation_of, streamed_allocation, tensor_of
from memtile.optim.dense_state import DenseParameter, Part, by_group, uneven
from memtile.optim.state_layout import MASTER, ParameterState, equal, is_shaped
from memtile.optim.tile_optimizer import TileOptimizer


@dataclass(frozen=True)
class KeptState:
    """The state of one dense parameter."""

    dense: DenseParameter
    tensors: Mapping[str, DenseParameter]  # by key: the shape, and the parts whose states hold it
    numbers: Mapping[str, Any]  # everything else by key, equal for all parts
    keys: Sequence[str]  # of both, in their order


def check_between_steps(optimizer: Optimizer) -> None:
    """Raise OptimizerError where a step is under way: some parameters are stepped, some not."""
    if not isinstance(optimizer, TileOptimizer):
        return
    if optimizer._unfinished is not None:
        raise OptimizerError(
            f"a step was not finished: {len(optimizer._unfinished)} parameters are still to be "
            "stepped; call step() to go on with them before the training is saved"
        )
    if optimizer._stepped:
        raise OptimizerError(
            f"{len(optimizer._stepped)} parameters were stepped in backward, and step() was not "
            "called yet; call step() before the training is saved"
        )


def class_of(optimizer: Optimizer) -> str:
    """The full name of the optimizer's class; of a `TileOptimizer`, of the class it applies."""
    own = optimizer._inner._class if isinstance(optimizer, TileOptimizer) else type(optimizer)
    return f"{own.__module__}.{own.__qualname__}"


def members(
    model: nn.Module, groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, DenseParameter]]:
    """The dense parameters of each group by their names; all have to be the model's."""
    result = by_group(model, groups)
    for number, dense in ((n, dense) for n, group in enumerate(result) for dense in group):
        if not dense.name:
            raise OptimizerError(
                f"group {number} of the optimizer holds a {tuple(dense.shape)} parameter "
                f"that is not in this {type(model).__name__}; give the model that is trained, "
                "and make the optimizer after memtile.tile"
            )
    return [{dense.name: dense for dense in group} for group in result]


def check_keys(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise OptimizerError where the optimizer has state for what is no parameter of the model."""
    known = set(model.parameters())
    keys: Iterable[object] = optimizer.state  # torch says tensors, and checks nothing
    for key in keys:
        if not isinstance(key, Tensor) or key not in known:
            what = f"a {tuple(key.shape)} tensor" if isinstance(key, Tensor) else repr(key)
            raise OptimizerError(
                f"the optimizer keeps state for {what}, which is no parameter of this "
                f"{type(model).__name__}; only what is kept for parameters can be saved"
            )


def kept_state(
    kept: Mapping[Any, ParameterState],
    dense: DenseParameter,
    is_shaped: Callable[[object, Tensor], bool] = is_shaped,
) -> KeptState | None:
    """The state of a dense parameter, from an optimizer's state; None before its first step.

    OptimizerError where its tiles were not stepped equally often.
    """
    states = [kept.get(part.parameter, {}) for part in dense.parts]
    if not any(states):
        return None
    tensors, numbers = dict[str, DenseParameter](), dict[str, Any]()
    for key in states[0] or next(filter(None, states)):
        if not all(key in state for state in states):
            raise uneven(dense, key)
        entry = states[0][key]
        if is_shaped(entry, dense.parts[0].parameter):
            tensors[key] = dense
        elif isinstance(entry, Tensor) and entry.numel() > 1:
            tensors[key] = _of_own_shape(dense, key, entry)
        elif all(equal(entry, state[key]) for state in states):
            numbers[key] = entry
        else:
            raise uneven(dense, key)
    return KeptState(dense, tensors, numbers, list(states[0]))


def stepped_dtype(optimizer: Optimizer, parameter: Tensor) -> torch.dtype:
    """The dtype that a parameter is stepped in, which is also that of its moments."""
    if isinstance(optimizer, TileOptimizer):
        return optimizer._layout.stepped_dtype(parameter)
    return parameter.dtype


def keeps(optimizer: Optimizer, parameter: Tensor, key: str, stepped: torch.dtype) -> bool:
    """Whether an entry, stored when the parameter was stepped in dtype `stepped`, is of use.

    A float32 master is of none where the parameter is stepped in its own dtype.
    """
    is_master = key == MASTER and stepped != parameter.dtype
    return not is_master or stepped_dtype(optimizer, parameter) == stepped


def room_for(
    optimizer: Optimizer, parameter: Tensor, key: str, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """A tensor for a state entry in the parameter's home: the present one where it fits."""
    found = optimizer.state.get(parameter, {}).get(key)
    allocation = streamed_allocation(parameter) if shape == parameter.shape else None
    if isinstance(found, Tensor) and (found.shape, found.dtype) == (shape, dtype):
        own = allocation_of(found)
        if allocation is None or (own is not None and own.home is allocation.home):
            return found
    if allocation is None:
        return torch.empty(shape, dtype=dtype, device=parameter.device)
    with reservation_of(parameter):
        return tensor_of(allocation.home.allocate(shape, dtype))


def _of_own_shape(dense: DenseParameter, key: str, entry: Tensor) -> DenseParameter:
    part = dense.parts[0]
    if part.rect is not None:
        raise OptimizerError(
            f"{dense.name}: the optimizer keeps {key!r} of shape {tuple(entry.shape)} for a "
            f"{tuple(part.parameter.shape)} tile, of which there is no dense form; use an "
            "element-wise optimizer, or do not tile this layer"
        )
    return DenseParameter(dense.name, entry.shape, (Part(part.parameter),))
