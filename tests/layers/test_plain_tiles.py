"""When a tile is more than plain: whatever anyone did to one tile, the layer calls it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from paths import pair, path_of
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

HOOKS = {
    "forward hook": lambda tile, seen: tile.register_forward_hook(seen),
    "forward hook with kwargs": lambda tile, seen: tile.register_forward_hook(
        seen, with_kwargs=True
    ),
    "forward hook always called": lambda tile, seen: tile.register_forward_hook(
        seen, always_call=True
    ),
    "forward pre-hook": lambda tile, seen: tile.register_forward_pre_hook(seen),
    "forward pre-hook with kwargs": lambda tile, seen: tile.register_forward_pre_hook(
        seen, with_kwargs=True
    ),
    "backward hook": lambda tile, seen: tile.register_full_backward_hook(seen),
    "backward pre-hook": lambda tile, seen: tile.register_full_backward_pre_hook(seen),
}
GLOBAL_HOOKS = {
    "forward hook": torch_module.register_module_forward_hook,
    "forward pre-hook": torch_module.register_module_forward_pre_hook,
    "backward hook": torch_module.register_module_full_backward_hook,
    "backward pre-hook": torch_module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_of_any_kind_on_one_tile_runs_once(kind):
    """Forward, backward, before, after, with keywords: each alone makes tiles be called."""
    _, layer = pair((3, 2))
    seen = []
    HOOKS[kind](layer.tile(1, 1), lambda *args: seen.append(args[0]))

    output = layer(torch.randn(4, 13, requires_grad=True))
    output.sum().backward()

    assert seen == [layer.tile(1, 1)]
    assert path_of(layer(torch.randn(4, 13))) == "composed"


@pytest.mark.parametrize("kind", HOOKS)
def test_a_layer_is_fused_again_when_its_hook_is_gone(kind):
    """Removing the hook restores the fused path."""
    _, layer = pair((3, 2))
    handle = HOOKS[kind](layer.tile(0, 0), lambda *args: None)
    handle.remove()

    assert path_of(layer(torch.randn(4, 13))) == "fused"


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_a_global_hook_of_any_kind_sees_every_tile(kind):
    """Profilers and engines hook all modules at once: each tile's call is seen."""
    _, layer = pair((3, 2))
    seen = []
    handle = GLOBAL_HOOKS[kind](lambda module, *args: seen.append(module))
    try:
        layer(torch.randn(4, 13, requires_grad=True)).sum().backward()
    finally:
        handle.remove()

    assert set(seen) >= {tile for _, tile in layer.tiles()}


@contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    """An attribute of a class replaced, as some libraries do to all linears."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def test_a_forward_replaced_for_all_linears_is_honoured():
    """A library that patches `nn.Linear.forward` patches the tiles too."""
    _, layer = pair((3, 2))
    calls = []
    original = nn.Linear.forward

    def counted(self: nn.Linear, input: Tensor) -> Tensor:
        calls.append(self)
        return original(self, input)

    with patched(nn.Linear, "forward", counted):
        layer(torch.randn(4, 13))

    assert calls == [tile for _, tile in layer.tiles()]
    assert path_of(layer(torch.randn(4, 13))) == "fused"


class Derived(nn.Linear):
    """A subclass that changes nothing, for all that memtile can know."""


class Marked(nn.Parameter):
    """A parameter with a class of its own, as quantizers and engines use."""


def _own_class(tile: nn.Module) -> None:
    tile.__class__ = Derived


def _own_parameter(tile: nn.Module) -> None:
    tile.weight = Marked(tile.weight.detach())


def _own_forward(tile: nn.Module) -> None:
    tile.forward = lambda input: nn.Linear.forward(tile, input)


def _computed_weight(tile: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(tile)


CHANGES: list[Callable[[nn.Module], None]] = [
    _own_class,
    _own_parameter,
    _own_forward,
    _computed_weight,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_tile_that_is_anything_but_plain_is_called(change):
    """Another class, parameter class, forward or weight of one tile: composed, same values."""
    dense, layer = pair((3, 2), dtype=torch.float64)
    change(layer.tile(2, 0))
    x = torch.randn(4, 13, dtype=torch.float64)

    output = layer(x)

    assert path_of(output) == "composed"
    torch.testing.assert_close(output, dense(x))
