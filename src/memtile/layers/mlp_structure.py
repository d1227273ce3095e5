"""What an MLP's own forward does, told from one run of it on shapes alone.

The forward runs on the meta device with one row, its linears replaced by what gives the right shape
and notes the call; every other function that it calls is noted too (`TorchFunctionMode`). It is an
MLP where the input goes to gate and up (or up alone, or one linear whose two halves are both), what
they give through an element-wise function of gate, a product and dropout to down, and what that
gives to the result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from memtile.layers.gathered_calls import without_hooks_of_engines

Sizes = Mapping[str, int]  # of what each linear gives, by its name


class NoMlpError(Exception):
    """A forward is not that of an MLP; says why."""


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a run; 0 is the input."""

    number: int


@dataclass(frozen=True)
class Step:
    """A call of a function, its tensors replaced by their slots."""

    function: Any
    args: Any
    kwargs: Any
    given: tuple[Slot, ...]
    made: Slot

    def __call__(self, values: Mapping[Slot, Any]) -> Any:
        """What the function gives for the values in the slots."""
        args, kwargs = tree_map_only(Slot, values.__getitem__, (self.args, self.kwargs))
        return self.function(*args, **kwargs)

    @property
    def name(self) -> str:
        """That of the function, without the underscores of its in-place form or operator."""
        return str(getattr(self.function, "__name__", "")).strip("_")


@dataclass(frozen=True)
class Steps:
    """A function of one tensor, as the calls that it is made of."""

    steps: tuple[Step, ...]
    given: Slot
    made: Slot

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same calls with this tensor."""
        values = {self.given: tensor}
        for step in self.steps:
            values[step.made] = step(values)
        return values[self.made]


class MlpStructure(NamedTuple):
    """The linears of an MLP by their names, and what is done between and after them."""

    gate: str | None
    up: str
    down: str
    activation: Steps
    dropout: float
    after: Steps  # of what down gives
    gate_half: int | None = None  # of the rows of a linear that is gate and up: which are gate's


def structure_of(
    module: nn.Module, forward: Callable[..., Any], sizes: Sizes, x: Tensor, rows: int = 1
) -> MlpStructure:
    """The structure of an MLP, whose linears give as many features as `sizes` says.

    Args:
        module: what has the linears among its children.
        forward: of its class, without `self` bound.
        sizes: the names of the linears.
        x: an input, of which width and dtype are read.
        rows: of the input that it is run with, in each of its dimensions.

    Raises:
        NoMlpError: the forward does anything else.
    """
    recording = _Recording()
    with torch.inference_mode(False):  # or it would count no writes
        lead = [rows] * (x.dim() - 1)
        given = torch.empty(*lead, x.shape[-1], dtype=x.dtype, device="meta")
        recording.know(given)
    children = {
        name: _Linear(child, sizes[name], name, recording)
        if name in sizes
        else without_hooks_of_engines(child)
        for name, child in module._modules.items()
    }
    copy = object.__new__(type(module))
    copy.__dict__ = {**module.__dict__, "_modules": children}
    try:
        with torch.inference_mode(False), torch.no_grad(), recording:
            result = forward(copy, given)
    except NoMlpError:
        raise
    except Exception as error:  # the module's own code, which may do anything
        raise NoMlpError(
            f"its forward cannot be followed with shapes alone ({type(error).__name__}: {error})"
        ) from error
    return _structure(recording, recording.slot(result), len(sizes))


class _Linear:
    """Stands for a linear while its MLP's forward runs on shapes; reads are the linear's."""

    def __init__(
        self, layer: nn.Module | None, features: int, name: str, recording: "_Recording"
    ) -> None:
        self._layer, self._features, self._name = layer, features, name
        self._recording = recording

    def __getattr__(self, name: str) -> Any:
        with torch._C.DisableTorchFunction():  # what makes the weight of a tiled layer is not noted
            return getattr(self._layer, name)

    def __call__(self, x: Tensor) -> Tensor:
        recording = self._recording
        made = torch.empty(*x.shape[:-1], self._features, dtype=x.dtype, device="meta")
        recording.add(self._name, (), {}, [recording.slot(x)], made)
        return made


@dataclass(frozen=True)
class _Half:
    """The step that made one of the halves of a tensor's last dimension."""

    number: int


def _are_halves(found: Sequence[Any], given: Sequence[Tensor]) -> bool:
    """Whether a function cut its one tensor in the middle, into views, as `chunk(2, -1)` does."""
    if len(found) != 2 or len(given) != 1 or not all(isinstance(each, Tensor) for each in found):
        return False
    shape = torch.Size((*given[0].shape[:-1], given[0].shape[-1] // 2))
    starts = [each.storage_offset() for each in found]
    return (
        shape.numel() * 2 == given[0].numel()
        and all(each.shape == shape and each._is_view() for each in found)
        and starts == [0, shape[-1]]
    )


class _Recording(TorchFunctionMode):
    """The calls of functions that take and give what was made of an input, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._slots: dict[int, Slot] = {}  # by the tensor's id
        self._tensors: dict[int, tuple[Tensor, int]] = {}  # and its version; so ids stay its own

    def know(self, tensor: Tensor) -> Slot:
        """A new slot, where this tensor is from now on."""
        slot = self._slots[id(tensor)] = Slot(len(self.steps))
        self._tensors[id(tensor)] = tensor, tensor._version
        return slot

    def slot(self, value: Any) -> Slot:
        """Where a tensor is; NoMlpError where it is none that was made of the input."""
        if id(value) not in self._slots:
            raise NoMlpError(
                "its forward uses a tensor that is neither its input nor made of it"
                if isinstance(value, Tensor)
                else f"its forward gives a {type(value).__name__}, no tensor"
            )
        return self._slots[id(value)]

    def add(self, function: Any, args: Any, kwargs: Any, given: Any, made: Tensor) -> None:
        """A step that made a tensor, or wrote to it."""
        step = Step(function, args, kwargs, tuple(given), Slot(len(self.steps) + 1))
        self.steps.append(step)
        self.know(made)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if not tensors or getattr(func, "__name__", "") == "__get__":  # a shape, a dtype
            return func(*args, **kwargs)
        given = [self.slot(each) for each in tensors]  # refused before a buffer, say, is written
        own_args, own_kwargs = tree_map_only(Tensor, self.slot, (args, kwargs))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            version = self._tensors.get(id(result), (result, -1))[1]
            if version != result._version:  # or it is one of the arguments, as it was
                if result.dtype != tensors[0].dtype:
                    raise NoMlpError(f"its forward changes the dtype to {result.dtype}")
                self.add(func, own_args, own_kwargs, given, result)
        elif isinstance(result, tuple | list):
            if not _are_halves(result, tensors):
                raise NoMlpError(f"its forward calls {func.__name__}, which gives several tensors")
            for number, half in enumerate(result):
                self.add(_Half(number), own_args, own_kwargs, given, half)
        if any(tensor._version != version for tensor, version in self._tensors.values()):
            raise NoMlpError(f"its forward writes to a tensor by {func.__name__}")
        return result


def _structure(recording: _Recording, result: Slot, count: int) -> MlpStructure:
    """What the steps are, of so many linears."""
    steps = {step.made: step for step in recording.steps}
    linears = [step for step in recording.steps if isinstance(step.function, str)]
    inner = [step for step in linears if step.given == (Slot(0),)]
    outer = [step for step in linears if step not in inner]
    names = [step.function for step in linears]
    if len(outer) != 1 or len(names) != len(set(names)) or len(names) != count:
        raise NoMlpError(
            f"its forward calls {', '.join(names) or 'no linear'}; of an MLP each linear is called "
            "once, all but one with the input, and one with what is made of what they give"
        )
    down = outer[0]
    after = between(steps, down.made, result, "what down gives and the result")
    h, dropout = without_dropout(steps, down.given[0])
    halves = [step for step in recording.steps if isinstance(step.function, _Half)]
    is_both = len(inner) == 1 and [step.given for step in halves] == [(inner[0].made,)] * 2
    gate: Step | None = None
    if len(inner) == 1 and not is_both:
        (up,), end = inner, h
    else:
        gate, up, end = _factors(steps.get(h), halves if is_both else inner)
    activation = between(steps, (gate or up).made, end, "its linears")
    if not activation.steps:
        raise NoMlpError("its forward has no activation between its linears")
    rest = activation, dropout, after
    if gate is not None and is_both:
        name = inner[0].function
        return MlpStructure(name, name, down.function, *rest, gate.function.number)
    gate_name = None if gate is None else gate.function
    return MlpStructure(gate_name, up.function, down.function, *rest)


def without_dropout(steps: Mapping[Slot, Step], h: Slot) -> tuple[Slot, float]:
    """What dropout is given that makes h, and its part; h itself where none does."""
    step = steps.get(h)
    if step is None or step.function is not functional.dropout:
        return h, 0.0
    options = dict(zip(("input", "p", "training"), step.args, strict=False)) | step.kwargs
    part = options.get("p", 0.5) if options.get("training", True) else 0.0
    return step.given[0], part


def _factors(product: Step | None, inner: Sequence[Step]) -> tuple[Step, Step, Slot]:
    """Gate, up, and where the activation of gate is, of their product."""
    if product is not None and product.name in ("mul", "imul", "multiply"):
        for a, b in (product.given, product.given[::-1]) if len(product.given) == 2 else ():
            up = next((step for step in inner if step.made == b), None)
            if up is not None and a != b:
                gate = next(step for step in inner if step is not up)
                return gate, up, a
    raise NoMlpError(
        "its forward gives down something else than the product of what one linear gives and an "
        "activation of what the other gives"
    )


def between(steps: Mapping[Slot, Step], start: Slot, end: Slot, where: str) -> Steps:
    """The steps from one slot to another, which depend on nothing else."""
    found: dict[Slot, Step] = {}
    ahead = [end]
    while ahead:
        slot = ahead.pop()
        if slot == start or slot in found:
            continue
        step = steps.get(slot)
        if step is None or isinstance(step.function, str | _Half):
            raise NoMlpError(f"between {where} its forward uses something else")
        found[slot] = step
        ahead += step.given
    return Steps(tuple(found[slot] for slot in steps if slot in found), start, end)
