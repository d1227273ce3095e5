"""A module that was replaced and is used from elsewhere is not trained in silence."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memtile
from memtile.errors import ReplacedModuleWarning


class Net(nn.Module):
    """Two linears, and the attributes that a test adds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 31), nn.Linear(31, 12)
        self.other: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """The output of both."""
        result: Tensor = self.down(torch.tanh(self.up(x)))
        return result


class Runner:
    """An object that is no module and holds one."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


def closure_over(module: nn.Module) -> Callable[[Tensor], Any]:
    """A function that calls a module."""
    return lambda x: module(x)


HOLDERS: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "a list": (lambda up: [up], r"Net\.other \(a list\) holds it"),
    "a dictionary of lists": (lambda up: {"a": [up]}, r"Net\.other \(a dict\) holds it"),
    "a bound method": (lambda up: up.forward, r"Net\.other \(a method\) holds it"),
    "a partial": (lambda up: functools.partial(map, up), r"Net\.other \(a partial\) holds it"),
    "a closure": (closure_over, r"Net\.other \(a function\) holds it"),
    "an object": (Runner, r"Net\.other \(a Runner\) holds it"),
    "a view": (lambda up: up.weight.t(), r"Net\.other \(a Tensor\) has the memory of its weight"),
    "its data": (lambda up: [up.weight.data], r"Net\.other \(a list\) has the memory"),
    "its parameter": (lambda up: (up.weight,), r"Net\.other \(a tuple\) has the memory"),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_who_holds_a_replaced_module_is_named(holder: str) -> None:
    """Attributes of the model that lead to the old module, or to its weight."""
    model = Net()
    make, told = HOLDERS[holder]
    model.other = make(model.up)

    with pytest.warns(ReplacedModuleWarning, match=f"up was replaced, and {told}"):
        memtile.tile(model, out_splits=3)


def test_a_list_of_the_module_around_the_part_that_is_tiled_is_named() -> None:
    """An old module held outside the tiled model is found; the other module is not named."""
    outer = Net()
    outer.inner = Net()
    outer.other = [outer.inner.down]

    with pytest.warns(ReplacedModuleWarning, match=r"down was replaced, and Net\.other \(a list\)"):
        memtile.tile(outer.inner, out_splits=3)


def test_another_model_with_the_same_module_is_named() -> None:
    """A module outside the tiled one that holds the dense module is named in the warning."""
    model, other = Net(), Net()
    other.up = model.up

    with pytest.warns(ReplacedModuleWarning, match=r"up was replaced, and Net\.up \(a Linear\)"):
        memtile.tile(model, out_splits=3)


def test_a_tie_with_what_is_not_tiled_is_named() -> None:
    """A head outside the part that is tiled keeps the dense weight of the embedding."""
    model = nn.Module()
    model.base, model.head = nn.Sequential(nn.Embedding(23, 12)), nn.Linear(12, 23)
    model.head.weight = model.base[0].weight

    with pytest.warns(ReplacedModuleWarning, match=r"0 was replaced, and Linear\.weight"):
        memtile.tile(model.base, out_splits=3)


def test_untile_says_who_holds_a_tiled_layer() -> None:
    """`untile` warns of a list that holds a tiled layer."""
    model = memtile.tile(Net(), out_splits=3)
    model.other = [model.up]

    with pytest.warns(ReplacedModuleWarning, match=r"up was replaced, and Net\.other \(a list\)"):
        memtile.untile(model)


def test_what_variables_hold_is_nobodys_use() -> None:
    """A caller's variables and functions, optimizers and other models cause no warning."""
    model, reference = Net(), Net()
    reference.load_state_dict(model.state_dict(), assign=True)
    up, layers, parameters = model.up, list(model.modules()), dict(model.named_parameters())
    call, state = closure_over(up), model.state_dict()
    model.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memtile.tile(model, out_splits=3)

    assert (layers[1], parameters["up.weight"].data_ptr()) == (up, state["up.weight"].data_ptr())
    assert torch.equal(call(torch.ones(12)), up(torch.ones(12)))


def test_a_leftover_that_only_the_collector_frees_is_nobodys_use() -> None:
    """A reference cycle of a deleted model causes no warning."""
    model = Net()
    model.other = Net()
    model.other.cycle, model.other.layers = [model.other], [model.up]
    model.other = None

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memtile.tile(model, out_splits=3)
    assert isinstance(model.up, memtile.TiledLinear)
