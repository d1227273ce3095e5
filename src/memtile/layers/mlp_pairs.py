"""MLPs whose two linears stand beside attention, or in two modules: OPT, BART, Whisper, BERT.

The module that has both is changed in place, and so are the linears: the first gives a
`DeferredHidden`, with which the second computes both by `tiled_mlp`. Which linears those are is
told from one run of the module's forward on shapes (`pairs_of`).
"""

import copy
import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from memtile import ops
from memtile.errors import ArgumentError, TileShapeError
from memtile.layers import checks
from memtile.layers.deferred_hidden import DeferredHidden, Family
from memtile.layers.derived_class import ChangedModule, apply_change, undo_change
from memtile.layers.gathered_calls import has_shards
from memtile.layers.mlp_in_tiles import can_be_in_tiles, is_worth_tiles
from memtile.layers.mlp_layers import MlpLayers
from memtile.layers.mlp_structure import NoMlpError, Steps
from memtile.layers.tiled_mlp import tiled_mlp


class MlpPair(NamedTuple):
    """The two linears of an MLP, by their names in a module."""

    up: str
    down: str


class _BlockCall(NamedTuple):
    """A call of a module that has pairs."""

    ups: frozenset[int]  # the ids of the linears that defer
    hooks: Any  # of saved tensors, when it began
    made: "list[weakref.ref[Family]]"  # by them


# Private by name; none before torch 2.8.
_top_hooks: Final = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

_call: Final = ContextVar[_BlockCall | None]("memtile pairs", default=None)


class MlpPairs(ChangedModule):
    """A module that has the linears of MLPs below it."""

    mlp_pairs: tuple[MlpPair, ...]

    def run(self, forward: partial[Any], args: Any, kwargs: Any) -> Any:
        """Its own forward, in which the linears that it has by now compute by tiles.

        What they defer lasts as long as the call: what is kept beyond it is computed.
        """
        if ops.transformed() or any(map(checks.has_hooks, self._between())):
            return forward(*args, **kwargs)
        call = _BlockCall(frozenset(map(self._changed, self.mlp_pairs)), _saving_hooks(), [])
        token = _call.set(call)
        try:
            result = forward(*args, **kwargs)
        finally:
            _call.reset(token)
        kept = [family for each in call.made if (family := each()) is not None]
        for family in kept:
            family.compute(DeferredHidden.stale)
        return tree_map_only(DeferredHidden, DeferredHidden.computed, result) if kept else result

    def _between(self) -> Iterator[nn.Module]:
        """The linears, what they are in, and all that may be between them: it has no parameters."""
        ends = [name for pair in self.mlp_pairs for name in pair]
        ahead = list(self.named_children())
        for path, module in ahead:
            if any(name == path or name.startswith(f"{path}.") for name in ends):
                yield module
                ahead += [(f"{path}.{own}", child) for own, child in module.named_children()]
            elif next(module.parameters(), None) is None:
                yield from module.modules()

    def _changed(self, pair: MlpPair) -> int:
        """The id of its first linear, once both have their changes."""
        for name, change in zip(pair, (UpInTiles, DownInTiles), strict=True):
            layer = self.get_submodule(name)
            if not isinstance(layer, change):  # it was tiled, or adapters were put around it
                for inner in layer.modules():
                    undo_change(inner, change)
                apply_change(layer, change)
        return id(self.get_submodule(pair.up))


class UpInTiles(ChangedModule):
    """The first linear of an MLP: what it gives is computed with the second, or when it is used."""

    keeps_values = True

    def run(self, forward: partial[Any], args: Any, kwargs: Any) -> Any:
        """The intermediate activation, deferred where it is worth it."""
        x, *others = (*args, *kwargs.values()) or (None,)
        features, call = getattr(self, "out_features", 0), _call.get()
        if call is None or id(self) not in call.ups or others or not _takes(x, features, self):
            return forward(*args, **kwargs)
        if x.is_inference() or call.hooks is not _saving_hooks():
            # nothing tells of writes to it, or a checkpoint computes it again outside of the block
            return forward(*args, **kwargs)
        made = DeferredHidden.of(self, features, forward, x)
        call.made.append(weakref.ref(made.family))
        return made


class DownInTiles(ChangedModule):
    """The second linear of an MLP."""

    keeps_values = True

    def run(self, forward: partial[Any], args: Any, kwargs: Any) -> Any:
        """By `tiled_mlp`, or by the linear's own forward of the values."""
        h, *others = (*args, *kwargs.values()) or (None,)
        if others or type(h) is not DeferredHidden:
            return forward(*args, **kwargs)
        found = _mlp_of(h, self)
        if found is None:
            return forward(h.computed())
        layers, activation, dropout = found
        return tiled_mlp(h.x, *layers, activation=activation, dropout=dropout)


def _takes(x: Any, features: int, *layers: nn.Module) -> bool:
    """Whether these linears of so many intermediate features are to be computed by tiles."""
    if not (can_be_in_tiles(x) and is_worth_tiles(x, features)) or checks.hooked_globally():
        return False
    return not any(checks.has_hooks(each) or has_shards(each) for each in layers)


def _mlp_of(h: DeferredHidden, down: nn.Module) -> tuple[MlpLayers, Steps, float] | None:
    """The layers, activation and dropout of an MLP; None where the linears are to be called."""
    layers, found = MlpLayers(None, h.up, down), _activation_of(h)
    try:
        layers.check()
    except TileShapeError:
        return None
    if not found or not _takes(h.x, h.shape[-1], h.up, down) or layers.weights() is None:
        return None
    return layers, *found


def _activation_of(h: DeferredHidden) -> tuple[Steps, float] | None:
    """The element-wise activation and the dropout that made it; None where its values are taken."""
    if h.is_used or not h.is_current:
        return None
    try:
        activation, dropout = h.activation()
        ops.check_element_wise(activation, h.shape[-1], dims=h.dim())
    except (NoMlpError, ArgumentError):
        return None
    return (activation, dropout) if activation.steps else None


def _saving_hooks() -> Any:
    """What packs tensors that are saved for backward now: a checkpoint, say; or None."""
    found: Any = None if _top_hooks is None else _top_hooks(True)
    return None if found is None else found[0]


def put_pairs_in_tiles(module: nn.Module, pairs: tuple[MlpPair, ...]) -> None:
    """Have `tiled_mlp` compute these linears of the module."""
    apply_change(module, MlpPairs)
    module.__dict__["mlp_pairs"] = pairs


def take_pairs_out_of_tiles(module: nn.Module) -> None:
    """Have the linears, and what they are in, compute by their own forwards again."""
    undo_change(module, UpInTiles)
    undo_change(module, DownInTiles)
    if undo_change(module, MlpPairs):
        del module.__dict__["mlp_pairs"]


def pairs_of(module: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> tuple[MlpPair, ...]:
    """The MLPs that the module's forward computes with linears below it, (out, in) by their names.

    A copy of the module without values runs on shapes, in training mode.

    Raises:
        NoMlpError: the forward cannot be followed, or has no MLP of two linears.
    """
    try:
        pairs = _pairs_in_run(module, shapes, others=None)
    except Exception:  # the module's own code, which may do anything
        try:
            pairs = _pairs_in_run(module, shapes, others="input")  # a residual, say
        except Exception as error:
            raise NoMlpError(
                f"its forward cannot be followed with shapes alone ({type(error).__name__}: "
                f"{error})"
            ) from error
    if not pairs:
        raise NoMlpError("none of its linears gives another one an activation of what it gives")
    return pairs


def _pairs_in_run(
    module: nn.Module, shapes: Mapping[str, tuple[int, int]], others: Literal["input"] | None
) -> tuple[MlpPair, ...]:
    """What a run shows, in which arguments after the first, where needed, are None or the input."""
    seen = _Seen([], [])
    dtype = next(each.dtype for each in module.parameters())
    memo: dict[int, Any] = {}
    for name, shape in shapes.items():
        linear = module.get_submodule(name)
        memo[id(linear)] = _StandIn(name, linear, shape, dtype, seen)
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    width = next(width for out, width in shapes.values() if out > width)
    with torch.inference_mode(False), torch.enable_grad():
        run = copy.deepcopy(module, memo).train()
        for each in run.modules():
            checks.drop_hooks(each)
        whole: type[nn.Module] = getattr(type(run), "whole_class", type(run))
        x = torch.empty(2, 3, width, dtype=dtype, device="meta", requires_grad=True)
        _, _, *more = inspect.signature(whole.forward).parameters.values()
        needed = [e for e in more if e.default is e.empty and e.kind is e.POSITIONAL_OR_KEYWORD]
        whole.forward(run, x, *((x if others else None) for _ in needed))
    return tuple(
        MlpPair(up, down)
        for up, down, h in seen.pairs
        if not h.is_used and seen.called.count(up) == seen.called.count(down) == 1
    )


class _Seen(NamedTuple):
    """What stand-ins were given."""

    pairs: list[tuple[str, str, DeferredHidden]]  # of which, to which, what
    called: list[str]


class _StandIn(nn.Module):
    """Stands for a linear while a forward runs on shapes, and notes what it is given."""

    def __init__(
        self,
        name: str,
        linear: nn.Module,
        shape: tuple[int, int],
        dtype: torch.dtype,
        seen: _Seen,
    ) -> None:
        super().__init__()
        self.name, self.out_features, self.in_features = name, *shape
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        bias = torch.empty(shape[0], dtype=dtype, device="meta")
        self.bias = nn.Parameter(bias) if getattr(linear, "bias", None) is not None else None
        self._seen = seen

    def forward(self, input: Tensor) -> Tensor:
        """(…, out) of (…, in), deferred."""
        self._seen.called.append(self.name)
        if type(input) is DeferredHidden and _activation_of(input):
            assert isinstance(input.up, _StandIn)
            self._seen.pairs.append((input.up.name, self.name, input))
            input = torch.empty(input.shape, dtype=input.dtype, device="meta", requires_grad=True)
        elif type(input) is DeferredHidden:
            input = input.computed()
        return DeferredHidden.of(self, self.out_features, self._now, input)

    def _now(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)
