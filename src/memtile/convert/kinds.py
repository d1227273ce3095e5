"""Which dense modules have a tiled form, and how other libraries (`Integration`) add to that."""

import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memtile.convert.naming import Naming
from memtile.geometry import Grid
from memtile.homes import Home
from memtile.layers import (
    StackOwner,
    TiledEmbedding,
    TiledLinear,
    TiledModule,
    TiledStack,
    class_of,
)

Work = Callable[[nn.Module], Tensor | None]
"""One step's forward: gives the loss, or None where nothing is trained."""

Beside = dict[str, bytes | Path]
"""Small files by name: their bytes, or the file to copy."""


@dataclass(frozen=True)
class Kind:
    """One kind of dense module and its tiled form.

    Args:
        name: for reasons, such as "linear".
        matches: whether a module is exactly of this kind, so that its tiled form can replace it.
        resembles: whether a module derives from it, so that `tile` gives a reason to keep it.
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


def _nothing(*given: object) -> None:
    """What an integration does where it has nothing to do."""


@dataclass(frozen=True)
class Stack:
    """A parameter of a module that is a stack of experts (E, R, C).

    Args:
        owner: what the module's class is derived from once its stack is in tiles.
        is_transposed: whether R × C is (in, out).
        used: experts that each token is routed to, at most.
        reads_values: whether the module's own forward cannot be counted with shapes alone.
    """

    owner: type[StackOwner]
    is_transposed: bool
    used: int
    reads_values: bool


@dataclass(frozen=True)
class Integration:
    """What another library needs when its models are tiled.

    Args:
        kinds: its own dense modules.
        stacks: the stacks of experts among a module's own parameters, by name.
        keeps: names below which the model's modules stay dense, each with the reason.
        replaced: called with (old, new) after each replacement, in both directions.
        naming: how names differ in checkpoints of a model; None where the model is not its own.
        beside: small files that the model's checkpoint has beside the tensors. Called with the
            dtype of the weights there, or None where it is the model's own.
        read_from: called with a model that got its values from a folder, and with the folder.
        empty: makes a model on the meta device from a config or a folder, and a dtype or None;
            None where the source is not one of its own.
        check_files: called with the path of a checkpoint, to refuse one that cannot be read as
            plain tensors.
        initialise: called with a model and names of parameters whose memory is new, to give them
            values by the model's own rule.
        filled: called with a model whose parameters got values from a checkpoint.
        emptied: called with a model that `empty_model` made, to change what the library changes
            when it reads weights.
        heads: the modules that give a model's logits.
        work: one step's forward, from the model, the tokens, the batch and whether it trains; None
            where the model is not its own.
    """

    library: str
    kinds: tuple[Kind, ...] = ()
    stacks: Callable[[nn.Module], Mapping[str, Stack]] = lambda module: {}
    keeps: Callable[[nn.Module], dict[str, str]] = lambda model: {}
    replaced: Callable[[nn.Module, nn.Module], None] = _nothing
    naming: Callable[[nn.Module], Naming | None] = lambda model: None
    beside: Callable[[nn.Module, torch.dtype | None], Beside] = lambda model, dtype: {}
    read_from: Callable[[nn.Module, Path], None] = _nothing
    empty: Callable[[object, torch.dtype | None], nn.Module | None] = lambda source, dtype: None
    check_files: Callable[[Path], None] = lambda path: None
    initialise: Callable[[nn.Module, Collection[str]], None] = lambda model, names: None
    filled: Callable[[nn.Module], None] = _nothing
    emptied: Callable[[nn.Module], None] = _nothing
    heads: Callable[[nn.Module], Iterable[nn.Module]] = lambda model: ()
    work: Callable[[nn.Module, int, int, bool], Work | None] = lambda *given: None


LINEAR = Kind(
    name="linear",
    matches=lambda module: class_of(module) is nn.Linear,
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

STACK = Kind(
    name="stack of experts",
    matches=lambda module: False,  # it is a parameter of a module, whatever that is
    resembles=lambda module: False,
    tiled=TiledStack,
    shape=lambda module: module.shape,
    rows_only=True,
)


@dataclass(frozen=True)
class Tileable:
    """A weight that may become tiles, or a layer that is tiled already.

    Args:
        module: what has the weight.
        kind: None for a tiled layer.
        own: the weight's name in the module.
        stack: what is known of it where it is a stack of experts.
    """

    module: nn.Module
    kind: Kind | None
    own: str = "weight"
    stack: Stack | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The weight, or a tiled layer's handle of it."""
        found: nn.Parameter = getattr(self.module, self.own)
        return found

    @property
    def experts(self) -> int:
        """How many experts are stacked; 0 for none."""
        return self.weight.shape[0] if self.stack is not None else 0

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the weight; a stack (E, R, C) is the matrix (E·R, C)."""
        if isinstance(self.module, TiledModule):
            return self.module.grid.out_features, self.module.grid.in_features
        if self.stack is not None:
            experts, rows, columns = self.weight.shape
            return experts * rows, columns
        assert self.kind is not None
        return self.kind.shape(self.module)

    @property
    def description(self) -> str:
        """What it is, for reasons."""
        assert self.kind is not None
        return f"a stack of {self.experts} experts" if self.stack else f"a plain {self.kind.name}"

    def tiled(self, grid: Grid, tied_to: TiledModule | None, home: Home | None) -> TiledModule:
        """Its tiled form."""
        assert self.kind is not None
        if self.stack is None:
            return self.kind.tiled.from_dense(self.module, grid, tied_to, home)
        return TiledStack.from_stack(self.weight, grid, self.stack.is_transposed, tied_to, home)

    def replace_by(self, layer: TiledModule, model: nn.Module) -> None:
        """Put its tiled form in its place in the model."""
        if self.stack is None:
            replace_module(model, self.module, layer)
            return
        assert isinstance(layer, TiledStack)
        self.stack.owner.put_stack(self.module, self.own, layer)
        for integration in integrations():
            integration.replaced(self.module, layer)


_integrations: list[Integration] = []


def register_integration(integration: Integration) -> None:
    """Make `tile` and `untile` know another library's modules."""
    _integrations.append(integration)


def integrations(*, imported_only: bool = True) -> list[Integration]:
    """The registered integrations whose library this process has imported, or all of them.

    All are asked for what may come before the import: `empty` and `check_files`.
    """
    return [own for own in _integrations if own.library in sys.modules or not imported_only]


def configs_beside(model: nn.Module, dtype: torch.dtype | None = None) -> Beside:
    """What the model's checkpoint, with weights of this dtype or its own, has beside them."""
    return {k: file for own in integrations() for k, file in own.beside(model, dtype).items()}


def naming_of(model: nn.Module) -> Naming:
    """How names may differ in checkpoints of this model."""
    return next((n for own in integrations() if (n := own.naming(model)) is not None), Naming())


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that a module is exactly of, or at least derives from."""
    exact = next((kind for kind in _kinds() if kind.matches(module)), None)
    return exact or next((kind for kind in _kinds() if kind.resembles(module)), None)


def _kinds(*, imported_only: bool = True) -> list[Kind]:
    found = integrations(imported_only=imported_only)
    return [*(kind for own in found for kind in own.kinds), LINEAR, EMBEDDING, STACK]


def tileables(model: nn.Module) -> Iterator[tuple[str, Tileable]]:
    """What may become tiles, and what is tiled, by name, each once, not looking into tiles.

    A linear or an embedding has its module's name, a stack of experts its parameter's.
    """
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, TiledModule):
            inside = (*inside, prefix)
            yield name, Tileable(module, None)
        elif kind := kind_of(module):
            yield name, Tileable(module, kind)
        else:
            yield from ((prefix + own, found) for own, found in _stacks_of(module).items())


def tileable(model: nn.Module, name: str) -> Tileable:
    """What has this name among `tileables`."""
    path, _, own = name.rpartition(".")
    parent = model.get_submodule(path)
    if own in parent._parameters:
        return _stacks_of(parent)[own]
    module = model.get_submodule(name)
    return Tileable(module, kind_of(module))


def _stacks_of(module: nn.Module) -> dict[str, Tileable]:
    return {
        own: Tileable(module, STACK, own, stack)
        for integration in integrations()
        for own, stack in integration.stacks(module).items()
    }


def tiled_layers(model: nn.Module, *, all_names: bool = False) -> Iterator[tuple[str, TiledModule]]:
    """The tiled layers of a model by name, each once, or under all names that it has."""
    for name, module in model.named_modules(remove_duplicate=not all_names):
        if isinstance(module, TiledModule):
            yield name, module


def tiled_classes() -> set[type[TiledModule]]:
    """The tiled forms of all kinds."""
    return {kind.tiled for kind in _kinds(imported_only=False)}


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands in the model."""
    known, found = {id(model)}, [model]
    for parent in found:  # `Module.modules` took a sixth of planning: it makes every name anew
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
            elif child is not None and id(child) not in known:
                known.add(id(child))
                found.append(child)
    for integration in integrations():
        integration.replaced(old, new)


HOOKS = ("forward", "forward_pre", "backward", "backward_pre", "state_dict")


def lost_on_replacing(module: nn.Module) -> str:
    """What someone put on the instance that a new module would not have; "" for nothing."""
    hooks = [kind for kind in HOOKS if getattr(module, f"_{kind}_hooks", None)]
    if hooks:
        return f"it has {' and '.join(hooks)} hooks, which would be lost; remove them first"
    for name in vars(module):
        if isinstance(getattr(type(module), name, None), types.FunctionType):
            return f"its {name} was replaced on the instance, which would be lost"
    return ""
