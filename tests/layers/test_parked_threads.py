"""Several threads at one parked model."""

import threading

import pytest
import torch
from parked_layers import HOMES, home_called, small_model
from threads import together
from torch import nn

import memtile
from memtile.ops import parked

THREADS, TURNS = 4, 10


@pytest.mark.parametrize("home", HOMES)
def test_gradients_of_all_threads_add_up(home):
    """Forty backwards by four threads give forty times the gradient of one, none is lost."""
    x = torch.randn(23, 13)
    model = memtile.tile(small_model(), out_splits=5, home=home_called(home))

    def train(turns):
        for _ in range(turns):
            model(x).square().mean().backward()

    train(1)
    expected = [parameter.grad.clone() * (1 + THREADS * TURNS) for parameter in model.parameters()]
    threads = [threading.Thread(target=train, args=(TURNS,)) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_threads_may_run_forward_at_once():
    """Every thread gets its own rows' results, with slabs that are fewer than the tiles."""
    model: nn.Module = memtile.tile(small_model(), out_splits=5, home=memtile.DiskHome())
    xs = [torch.randn(7, 13) for _ in range(THREADS)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
    wrong = []

    def infer(number):
        with torch.no_grad():
            for _ in range(TURNS):
                if not torch.equal(model(xs[number]), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=infer, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong


def in_backward(act):
    """Call it inside a backward of this thread."""
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(act)
    y.backward()


class Shared:
    """A node of an engine that another thread runs as soon as a hook is registered."""

    def register_prehook(self, hook):
        self.hook = hook
        together(lambda: in_backward(lambda grad: hook((grad,)) or None))
        return self

    def remove(self):
        del self.hook


class Source:
    flushes = 0

    def flush(self):
        self.flushes += 1


def test_a_gradient_is_flushed_by_its_own_backward_only():
    """Threads share the node that accumulates a parameter's gradients, not what they ask of it."""
    node, source = Shared(), Source()

    def ask(grad):
        parked.flush_before(node, source)
        assert not source.flushes
        node.hook((grad,))

    in_backward(ask)

    assert source.flushes == 1
    assert not hasattr(node, "hook")
