"""Which dense modules have a tiled form, and what other libraries add to that."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from memtile.layers import TiledEmbedding, TiledLinear, TiledModule


@dataclass(frozen=True)
class Kind:
    """One kind of dense module and its tiled form.

    Args:
        name: for reasons, "linear" say.
        matches: whether a module is exactly of this kind, so that its tiled form can stand for it.
        resembles: whether a module derives from it, so that a reason is owed when it is not tiled.
        tiled: the tiled form.
        shape: the (rows, columns) of a module's weight.
        rows_only: whether only rows can be cut, as in an embedding.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    resembles: Callable[[nn.Module], bool]
    tiled: type[TiledModule]
    shape: Callable[[Any], tuple[int, int]]
    rows_only: bool = False


def _nothing(*modules: nn.Module) -> None:
    """What an integration does where it has nothing to do."""


@dataclass(frozen=True)
class Integration:
    """What another library needs when its models are tiled.

    Args:
        kinds: dense modules of its own.
        keeps: gives, from the model, names below which its modules stay dense, with the reason.
        replaced: called with (old, new) after each replacement, in both directions.
        tiled: called with a model that was tiled.
        untiled: called with a model that was turned back.
    """

    kinds: tuple[Kind, ...] = ()
    keeps: Callable[[nn.Module], dict[str, str]] = lambda model: {}
    replaced: Callable[[nn.Module, nn.Module], None] = _nothing
    tiled: Callable[[nn.Module], None] = _nothing
    untiled: Callable[[nn.Module], None] = _nothing


LINEAR = Kind(
    name="linear",
    matches=lambda module: type(module) is nn.Linear,
    resembles=lambda module: isinstance(module, nn.Linear),
    tiled=TiledLinear,
    shape=lambda module: (module.out_features, module.in_features),
)
EMBEDDING = Kind(
    name="embedding",
    matches=lambda module: type(module) is nn.Embedding,
    resembles=lambda module: isinstance(module, nn.Embedding),
    tiled=TiledEmbedding,
    shape=lambda module: (module.num_embeddings, module.embedding_dim),
    rows_only=True,
)

_integrations: list[Integration] = []


def register_integration(integration: Integration) -> None:
    """Make `tile` and `untile` know another library's modules."""
    _integrations.append(integration)


def integrations() -> tuple[Integration, ...]:
    """Every registered integration."""
    return tuple(_integrations)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that a module is exactly of, or at least derives from."""
    exact = next((kind for kind in _kinds() if kind.matches(module)), None)
    return exact or next((kind for kind in _kinds() if kind.resembles(module)), None)


def _kinds() -> list[Kind]:
    return [kind for found in _integrations for kind in found.kinds] + [LINEAR, EMBEDDING]


def tiled_classes() -> set[type[TiledModule]]:
    """The tiled forms of all kinds."""
    return {kind.tiled for kind in _kinds()}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
    for integration in _integrations:
        integration.replaced(old, new)
