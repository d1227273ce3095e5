"""Which modules of a model are tiled, with which grid, and why the others are not."""

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from memtile.convert.kinds import Kind, integrations, kind_of, lost_on_replacing
from memtile.errors import ArgumentError, CannotTileError, SplitsError
from memtile.geometry import Grid
from memtile.layers import TiledModule

Place = tuple[str, str]  # a module's name, and a parameter's own


@dataclass(frozen=True)
class TilingDecision:
    """What happens to one module.

    Args:
        name: the module's name in the model.
        tiled: whether it is tiled.
        reason: why, or why not.
        shape: (rows, columns) of its weight.
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
                unit = ", in bytes, such as 1 << 20" if name == "max_tile_bytes" else ""
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

    def grid(self, shape: tuple[int, int], element_bytes: int, rows_only: bool) -> Grid | str:
        """The grid of a weight of this shape, or the reason why it stays dense."""
        if self.max_tile_bytes is None:
            columns = 1 if rows_only else self.in_splits
            try:
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
                f"{self.max_tile_bytes}, and an embedding is cut between rows only"
            )
        return Grid.fewest(*shape, elements) if elements else "max_tile_bytes holds no element"


def select_linears(
    model: nn.Module,
    *,
    out_splits: int | None = None,
    in_splits: int = 1,
    max_tile_bytes: int | None = None,
    modules: Collection[str] | None = None,
) -> list[TilingDecision]:
    """What `tile` would do with the same arguments: each linear and embedding, with the reason.

    Args:
        model: any module.
        out_splits: rows of tiles for every module.
        in_splits: columns of tiles for every linear (embeddings, and what is tied to them, keep 1).
        max_tile_bytes: the largest weight tile; weights that fit stay dense.
        modules: names to choose from; all by default.

    Returns:
        One `TilingDecision` for each linear and embedding, in the model's order.

    Raises:
        ArgumentError: the sizes make no sense, or a name is no module of the model.
        CannotTileError: a module named in `modules` cannot be tiled.
    """
    return choose(model, Cut(out_splits, in_splits, max_tile_bytes), modules)


def choose(model: nn.Module, cut: Cut, modules: Collection[str] | None) -> list[TilingDecision]:
    """`select_linears` for a cut that is checked already."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a {type(model).__name__}; it must be an nn.Module")
    candidates = dict(_candidates(model))
    modules = _checked_names(model, candidates, modules)
    kept = [(name, why) for found in integrations() for name, why in found.keeps(model).items()]
    reasons = {
        name: _own_reason(name, module, kept, modules) for name, (module, _) in candidates.items()
    }
    owners = Owners(model)
    groups = _ties(owners, candidates, reasons)
    decisions = []
    for name, (module, kind) in candidates.items():
        shape = _shape(module, kind)
        decision = TilingDecision(name, False, reasons[name], shape, ties=groups.get(name, ()))
        if not reasons[name]:
            keeps_bias = owners.is_shared(module._parameters.get("bias"))
            decision = _with_grid(replace(decision, keeps_bias=keeps_bias), candidates, cut)
        decisions.append(decision)
        if modules is not None and name in modules and not decision.tiled:
            raise CannotTileError(f"{name} cannot be tiled: {decision.reason}")
    return decisions


def _candidates(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, Kind | None]]]:
    """Linears and embeddings by name, each once, not looking into tiled layers."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, TiledModule):
            inside = (*inside, f"{name}." if name else "")
            yield name, (module, None)
        elif kind := kind_of(module):
            yield name, (module, kind)


def _shape(module: nn.Module, kind: Kind | None) -> tuple[int, int]:
    if isinstance(module, TiledModule):
        return module.grid.out_features, module.grid.in_features
    assert kind is not None
    return kind.shape(module)


def _own_reason(
    name: str,
    module: nn.Module,
    kept: list[tuple[str, str]],
    modules: Collection[str] | None,
) -> str:
    """Why this module, looked at alone, stays dense; "" where it can be tiled."""
    if isinstance(module, TiledModule):
        return f"it is in {module.grid} tiles already; untile first to cut it anew"
    if not name:
        return "it is the model itself, which cannot be replaced in place; use from_linear"
    if modules is not None and name not in modules:
        return "it is not among the modules asked for"
    for prefix, why in kept:
        if name == prefix or name.startswith(prefix + "."):
            return why
    kind = kind_of(module)
    assert kind is not None
    if not kind.matches(module):
        return (
            f"{type(module).__name__} is a class of its own, whose behaviour tiles might not keep"
        )
    empty = "" if min(kind.shape(module)) else "it has no elements"
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
    for name in ("weight", "bias"):
        parameter = getattr(module, name, None)
        if parameter is None and name == "bias":
            continue
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
    owners: Owners,
    candidates: dict[str, tuple[nn.Module, Kind | None]],
    reasons: dict[str, str],
) -> dict[str, tuple[str, ...]]:
    """Names that share a weight; a weight shared with what stays dense keeps all of them dense."""
    shared: dict[str, list[Place]] = {}
    for name, (module, _) in candidates.items():
        if reasons[name]:
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        views = list(owners.sharing_memory(weight))
        if views:
            where = ".".join(views[0])
            reasons[name] = f"its weight shares memory with {where}, which tiles could not"
        elif len(owners.of(weight)) > 1:
            shared[name] = owners.of(weight)
    for name, places in shared.items():
        for owner, own in places:
            is_tiled = own == "weight" and reasons.get(owner) == ""
            if not is_tiled:
                why = reasons.get(owner) or "it is not a linear or an embedding"
                where = f"{owner}.{own}" if owner else own
                shares = f"its weight is also {where}, which stays dense: {why}"
                reasons[name] = reasons[name] or shares
    return {
        name: tuple(path for path, _ in places)
        for name, places in shared.items()
        if not reasons[name]
    }


def _with_grid(
    decision: TilingDecision, candidates: dict[str, tuple[nn.Module, Kind | None]], cut: Cut
) -> TilingDecision:
    module, kind = candidates[decision.name]
    assert kind is not None
    tied_kinds = [candidates[name][1] for name in decision.ties]
    if len({k.tiled.weight_is_transposed for k in tied_kinds if k}) > 1:
        return replace(decision, reason="it shares a weight with a transposed linear")
    others = ", ".join(name for name in decision.ties if name != decision.name)
    more = f", tied with {others}" if others else ""
    if decision.keeps_bias:
        more += ", its bias kept whole: others share it"
    if not cut.is_given:
        return replace(decision, tiled=True, reason=f"a plain {kind.name}{more}")
    rows_only = kind.rows_only or any(k.rows_only for k in tied_kinds if k)
    weight = module._parameters["weight"]
    assert weight is not None
    grid = cut.grid(decision.shape, weight.element_size(), rows_only)
    if isinstance(grid, str):
        return replace(decision, reason=grid)
    return replace(decision, tiled=True, reason=f"a plain {kind.name}{more}", grid=grid)


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
        what = "no linear or embedding" if unknown[0] in everything else "no module"
        raise ArgumentError(
            f"{unknown[0]!r} is {what} of {type(model).__name__}; "
            "memtile.convert.select_linears(model) lists the names that can be tiled"
        )
    return names
