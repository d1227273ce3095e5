"""Which modules of a model are tiled, with which grid, and why the others are not."""

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from memtile.convert.kinds import Tileable, integrations, lost_on_replacing, tileables
from memtile.costmodel.byte_sizes import size_in_bytes
from memtile.errors import ArgumentError, CannotTileError, SplitsError
from memtile.geometry import Grid
from memtile.layers import TiledModule

Place = tuple[str, str]  # a module's name, and a parameter's own


@dataclass(frozen=True)
class TilingDecision:
    """What happens to one module, or to one stack of experts.

    Args:
        name: the module's name in the model, or the stack's own, as of a parameter.
        tiled: whether it is tiled.
        reason: why, or why not.
        shape: (rows, columns) of its weight; a stack (E, R, C) is the matrix (E·R, C).
        grid: how it is cut, where it is and a size was asked for.
        ties: the names of all modules that share its weight, itself included, in order.
        keeps_bias: whether its bias stays whole, since others share it.
    """

    name: str
    tiled: bool
    reason: str
    shape: tuple[int, int]
    grid: Grid | None = None
    ties: tuple[str, ...] = ()
    keeps_bias: bool = False

    def __str__(self) -> str:
        size = f"{self.shape[0]}×{self.shape[1]}"
        grid = f" → {self.grid} tiles" if self.grid else ""
        return f"{'yes' if self.tiled else 'no ':3} {self.name} {size}{grid}: {self.reason}"


@dataclass(frozen=True)
class Cut:
    """How fine to cut: a number of splits, or the largest tile that is wanted.

    Args:
        out_splits: rows of tiles for every module, or None.
        in_splits: columns of tiles for every linear.
        max_tile_bytes: bytes of the largest weight tile, or None.
        parks: tiles go to a home: a layer that fits in one tile becomes one.

    Raises:
        ArgumentError: both, or a value that is no whole number above 0.
    """

    out_splits: int | None = None
    in_splits: int = 1
    max_tile_bytes: int | None = None
    parks: bool = False

    def __post_init__(self) -> None:
        for name in ("out_splits", "in_splits", "max_tile_bytes"):
            value = getattr(self, name)
            if value is None and name != "in_splits":
                continue
            whole = hasattr(value, "__index__") and not isinstance(value, bool)
            if not whole or value < 1:
                unit = ', in bytes, or a size such as "1MiB"' if name == "max_tile_bytes" else ""
                raise ArgumentError(f"{name}={value!r} must be a whole number of at least 1{unit}")
            object.__setattr__(self, name, operator.index(value))
        if self.max_tile_bytes is not None and (self.out_splits is not None or self.in_splits != 1):
            raise ArgumentError(
                "max_tile_bytes chooses the splits by itself; give it alone, or give out_splits "
                "and in_splits"
            )

    @property
    def is_given(self) -> bool:
        """Whether a size was asked for at all."""
        sized = self.max_tile_bytes is not None or self.out_splits is not None
        return sized or self.in_splits > 1 or self.parks

    def grid(
        self, shape: tuple[int, int], element_bytes: int, rows_only: bool, experts: int = 0
    ) -> Grid | str:
        """The grid of a weight of this shape, or the reason why it stays dense.

        A stack's bounds respect its experts; without a size each expert is a tile.
        """
        stack = (experts, shape[0] // experts, shape[1]) if experts else ()
        if self.max_tile_bytes is None:
            columns = 1 if rows_only else self.in_splits
            try:
                if stack:
                    return Grid.split_stack(*stack, self.out_splits or experts)
                return Grid.uniform(*shape, self.out_splits or 1, columns)
            except SplitsError as error:
                return str(error)
        weight_bytes = shape[0] * shape[1] * element_bytes
        if weight_bytes <= self.max_tile_bytes and self.parks:
            return Grid.uniform(*shape)
        if weight_bytes <= self.max_tile_bytes:
            return f"its {weight_bytes} bytes fit in max_tile_bytes={self.max_tile_bytes}"
        elements = self.max_tile_bytes // element_bytes
        if rows_only and elements < shape[1]:
            return (
                f"one row has {shape[1] * element_bytes} bytes, more than max_tile_bytes="
                f"{self.max_tile_bytes}, and {'a stack' if stack else 'an embedding'} is cut "
                "between rows only"
            )
        if stack:
            return Grid.of_stack(*stack, elements)
        return Grid.fewest(*shape, elements) if elements else "max_tile_bytes holds no element"


def select_linears(
    model: nn.Module,
    *,
    out_splits: int | None = None,
    in_splits: int = 1,
    max_tile_bytes: int | str | None = None,
    modules: Collection[str] | None = None,
) -> list[TilingDecision]:
    """What `tile` would do with the same arguments, with the reasons.

    Asked for are linears, embeddings and stacks of experts.

    Args:
        model: any module.
        out_splits: rows of tiles for every module. In a stack bounds fall between experts; more
            rows than experts cut each of them into the same number of parts.
        in_splits: columns of tiles for every linear (embeddings, what is tied to them, and stacks
            keep 1).
        max_tile_bytes: the largest weight tile, such as "16MiB"; weights that fit stay dense.
        modules: names to choose from; all by default.

    Returns:
        One `TilingDecision` for each linear, embedding and stack, in the model's order.

    Raises:
        ArgumentError: the sizes make no sense, or a name is no module of the model.
        CannotTileError: a module named in `modules` cannot be tiled.
    """
    largest = size_in_bytes(max_tile_bytes, "max_tile_bytes")
    return choose(model, Cut(out_splits, in_splits, largest), modules)


def choose(model: nn.Module, cut: Cut, modules: Collection[str] | None) -> list[TilingDecision]:
    """`select_linears` for a cut that is checked already."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    candidates = dict(tileables(model))
    modules = _checked_names(model, candidates, modules)
    kept = [(name, why) for found in integrations() for name, why in found.keeps(model).items()]
    reasons = {name: _own_reason(name, each, kept, modules) for name, each in candidates.items()}
    owners = Owners(model)
    groups = _ties(owners, candidates, reasons)
    decisions = []
    for name, each in candidates.items():
        ties = groups.get(name, ())
        decision = TilingDecision(name, False, reasons[name], each.shape, ties=ties)
        if not reasons[name]:
            bias = None if each.stack else each.module._parameters.get("bias")
            decision = replace(decision, keeps_bias=owners.is_shared(bias))
            decision = _with_grid(decision, candidates, cut)
        decisions.append(decision)
        if modules is not None and name in modules and not decision.tiled:
            raise CannotTileError(f"{name} cannot be tiled: {decision.reason}")
    return decisions


def _own_reason(
    name: str,
    found: Tileable,
    kept: list[tuple[str, str]],
    modules: Collection[str] | None,
) -> str:
    """Why this weight, looked at alone, stays dense; "" where it can be tiled."""
    module = found.module
    if isinstance(module, TiledModule):
        return f"it is in {module.grid} tiles already; untile first to cut it anew"
    if not name:
        return "it is the model itself, which cannot be replaced in place; use from_linear"
    if modules is not None and name not in modules:
        return "it is not among the modules asked for"
    for prefix, why in kept:
        if name == prefix or name.startswith(prefix + "."):
            return why
    empty = "" if min(found.shape) else "it has no elements"
    if found.stack is not None:
        replaced = "forward" in vars(module)
        lost = "its module's forward was replaced on the instance, which reads whole stacks"
        return (lost if replaced else "") or _parameter_reason(module, found.own) or empty
    assert found.kind is not None
    if not found.kind.matches(module):
        return (
            f"{type(module).__name__} is a class of its own, whose behaviour tiles might not keep"
        )
    return _state_reason(module) or _weight_reason(module) or empty


def _state_reason(module: nn.Module) -> str:
    lost = lost_on_replacing(module)
    if lost:
        return lost
    if getattr(module, "max_norm", None) is not None or getattr(module, "sparse", False):
        return "max_norm and sparse embeddings have no tiled form"
    extra = [*dict(module.named_children())]
    extra += [
        n for n, p in module._parameters.items() if n not in ("weight", "bias") and p is not None
    ]
    return f"it holds {extra[0]!r} besides weight and bias" if extra else ""


def _weight_reason(module: nn.Module) -> str:
    names = [name for name in ("weight", "bias") if getattr(module, name, None) is not None]
    reasons = (_parameter_reason(module, name) for name in dict.fromkeys(["weight", *names]))
    return next(filter(None, reasons), "")


def _parameter_reason(module: nn.Module, name: str) -> str:
    parameter = getattr(module, name, None)
    if type(parameter) is not nn.Parameter or name not in module._parameters:
        return f"its {name} is a {type(parameter).__name__}, not a plain parameter"
    if not parameter.is_floating_point():
        return f"its {name} is {parameter.dtype}, not a floating-point tensor"
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return f"its {name} has gradient hooks, which would be lost; remove them first"
    return ""


class Owners:
    """Every place, (module's name, parameter's own name), where a model holds each parameter.

    Parameters are told apart by id: use it only while the model is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[Place]] = defaultdict(list)
        self._storages: dict[int, dict[int, Place]] = defaultdict(dict)
        for path, module in model.named_modules():
            for own, parameter in module._parameters.items():
                if parameter is not None:
                    self._places[id(parameter)].append((path, own))
                    self._storages[_storage(parameter)].setdefault(id(parameter), (path, own))

    def of(self, parameter: nn.Parameter) -> list[Place]:
        """Where the parameter stands."""
        return self._places[id(parameter)]

    def is_shared(self, parameter: nn.Parameter | None) -> bool:
        """Whether it, or a view of its memory, stands in more than one place."""
        if parameter is None:
            return False
        return len(self.of(parameter)) > 1 or any(self.sharing_memory(parameter))

    def sharing_memory(self, parameter: nn.Parameter) -> Iterator[Place]:
        """Where other parameters stand that are views of the same memory."""
        if _storage(parameter):
            for other, place in self._storages[_storage(parameter)].items():
                if other != id(parameter):
                    yield place


def _storage(parameter: nn.Parameter) -> int:
    """The address of a parameter's memory; 0 where it has none to compare."""
    if type(parameter) is not nn.Parameter or parameter.is_meta:
        return 0
    return parameter.untyped_storage().data_ptr()


def _ties(
    owners: Owners, candidates: dict[str, Tileable], reasons: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """Names that share a weight; a weight shared with what stays dense keeps all of them dense."""
    shared: dict[str, list[str]] = {}
    for name, each in candidates.items():
        if reasons[name]:
            continue
        views = list(owners.sharing_memory(each.weight))
        if views:
            where = ".".join(views[0])
            reasons[name] = f"its weight shares memory with {where}, which tiles could not"
        elif len(places := owners.of(each.weight)) > 1:
            shared[name] = [_name_of(place, candidates) for place in places]
    for name, others in shared.items():
        for other in others:
            if reasons.get(other) != "":
                why = reasons.get(other) or "it is not a linear or an embedding"
                where = f"{other}.weight" if other in candidates else other
                shares = f"its weight is also {where}, which stays dense: {why}"
                reasons[name] = reasons[name] or shares
    return {name: tuple(others) for name, others in shared.items() if not reasons[name]}


def _name_of(place: Place, candidates: Collection[str]) -> str:
    """The candidate whose weight stands there, or else the parameter's own name."""
    path, own = place
    return path if own == "weight" and path in candidates else f"{path}.{own}" if path else own


def _with_grid(
    decision: TilingDecision, candidates: dict[str, Tileable], cut: Cut
) -> TilingDecision:
    found = candidates[decision.name]
    tied = [candidates[name].kind for name in decision.ties]
    kinds = [kind for kind in (found.kind, *tied) if kind is not None]
    if len({kind.tiled.weight_is_transposed for kind in kinds}) > 1:
        return replace(decision, reason="it shares a weight with a transposed linear")
    others = ", ".join(name for name in decision.ties if name != decision.name)
    more = f", tied with {others}" if others else ""
    if decision.keeps_bias:
        more += ", its bias kept whole: others share it"
    decision = replace(decision, tiled=True, reason=f"{found.description}{more}")
    if not cut.is_given:
        return decision
    rows_only, size = any(kind.rows_only for kind in kinds), found.weight.element_size()
    grid = cut.grid(decision.shape, size, rows_only, found.experts)
    if isinstance(grid, str):
        return replace(decision, tiled=False, reason=grid)
    return replace(decision, grid=grid)


def _checked_names(
    model: nn.Module, candidates: Collection[str], modules: Collection[str] | None
) -> set[str] | None:
    if modules is None:
        return None
    if isinstance(modules, str) or not isinstance(modules, Iterable):
        raise ArgumentError(
            f"modules={modules!r} must be a collection of names, such as [{str(modules)!r}]"
        )
    names = set(modules)
    unknown = sorted(names - set(candidates))
    if unknown:
        everything = dict(model.named_modules())
        what = "no linear, embedding or stack" if unknown[0] in everything else "no module"
        raise ArgumentError(
            f"{unknown[0]!r} is {what} of {type(model).__name__}; "
            "memtile.convert.select_linears(model) lists the names that can be tiled"
        )
    return names
