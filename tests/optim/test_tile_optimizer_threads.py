"""Optimizers of several threads: every bit is what one thread after the other would give."""

import threading

import pytest
import torch
from small_training import GRID, Lion, batches, loss_of, optimizer_for, same, small, train, values
from threads import PATIENCE_SECONDS, switching_often, together
from torch import nn, optim

from memtile import DiskHome, tile
from memtile.homes import HostHome

HOMES = {"device": lambda: "device", "host": HostHome, "disk": DiskHome}
TURNS = 5  # of each thread of a schedule


def _states(optimizer):
    """Copies of what is kept for each parameter, in the optimizer's order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = (optimizer.state[parameter] for parameter in parameters)
    return [{key: torch.as_tensor(v).clone() for key, v in state.items()} for state in states]


def _same_training(ours, theirs):
    """Whether weights and optimizers' states are the same, bit for bit."""
    pairs = zip(_states(ours.optimizer), _states(theirs.optimizer), strict=True)
    return same(values(ours.model), values(theirs.model)) and all(same(*pair) for pair in pairs)


class Halves:
    """Two threads at one model of two halves, which wait for each other at each step only.

    In backward each has its half, and classic each the whole: their gradients are summed.
    """

    def __init__(self, home, mode):
        torch.manual_seed(5)
        halves = (nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 7)) for _ in range(2))
        self.model = tile(nn.Sequential(*halves), out_splits=3, home=home)
        self.optimizer = optimizer_for(self.model, mode=mode)
        self.found, self._meeting = [], threading.Barrier(2)

    def threads(self):
        return [lambda: self._run(0), lambda: self._run(1)]

    def run_in_turn(self):
        for turn in range(TURNS):
            self._backward(turn, 0)
            self._backward(turn, 1)
            self._step()

    def _run(self, number):
        for turn in range(TURNS):
            self._backward(turn, number)
            self._meeting.wait(PATIENCE_SECONDS)
            if not number:
                self._step()
            self._meeting.wait(PATIENCE_SECONDS)

    def _backward(self, turn, number):
        part = self.model if self.optimizer.mode == "classic" else self.model[number]
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(2 * turn + number))
        part(x).square().mean().backward()

    def _step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


class Alone:
    """A thread with a model and an optimizer of its own, and what it does by a seeded schedule."""

    def __init__(self, seed, home, shared, optimizer_class, mode, dtype, **options):
        self.model, self.shared, self.found = tile(small(dtype), **GRID, home=home), shared, []
        self.optimizer = optimizer_for(self.model, optimizer_class, mode=mode, **options)
        acts = [self._train, self._accumulate, self._write, self._evaluate, self._infer]
        chosen = torch.randperm(len(acts), generator=torch.Generator().manual_seed(seed)).tolist()
        self._schedule = [self._train, *(acts[number] for number in chosen), self._train]
        self._ids = batches(len(self._schedule), seed)

    def threads(self):
        return [self.run_in_turn]

    def run_in_turn(self):
        for act, ids in zip(self._schedule, self._ids, strict=True):
            act(ids)

    def _train(self, ids):
        self.found += map(torch.tensor, train(self.model, self.optimizer, [ids]))

    def _accumulate(self, ids):
        if self.optimizer.mode == "classic":
            loss_of(self.model, ids.flip(0)).backward()
            loss_of(self.model, ids).backward()
            self.found.append(self.optimizer.clip_grad_norm_(0.1))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _write(self, ids):
        for parameter in self.model.parameters():
            parameter.data.mul_(0.9)

    @torch.no_grad()
    def _evaluate(self, ids):
        layer = self.model.up
        x = torch.ones(2, layer.in_features, dtype=self.model.norm.weight.dtype)
        self.found += [loss_of(self.model, ids), layer(x)]

    @torch.no_grad()
    def _infer(self, ids):
        self.found.append(self.shared(ids))


KINDS = [
    (optim.AdamW, "classic", torch.float32, {"lr": 0.01}),
    (optim.AdamW, "in_backward", torch.bfloat16, {"lr": 0.01}),
    (optim.Adagrad, "classic", torch.float32, {"lr": 0.05}),
    (optim.SGD, "in_backward", torch.float32, {"lr": 0.1}),
    (Lion, "classic", torch.bfloat16, {"lr": 0.002}),
]


def _works(seed):
    """Nine threads' works, at two disks and in host memory."""
    homes = [DiskHome(), DiskHome(), HostHome()]
    shared = tile(small(), **GRID, home=homes[0])
    alone = [
        Alone(seed + number, homes[number % 3], shared, cls, mode, dtype, **options)
        for number, (cls, mode, dtype, options) in enumerate(KINDS)
    ]
    return [*alone, Halves(homes[0], "classic"), Halves(homes[1], "in_backward")]


def test_many_threads_give_the_bits_of_one():
    """Models, optimizers and homes used from several threads give the results of one thread."""
    works, references = _works(seed=1), _works(seed=1)

    with switching_often():
        together(*(act for work in works for act in work.threads()))
    for reference in references:
        reference.run_in_turn()

    for work, reference in zip(works, references, strict=True):
        assert all(map(torch.equal, work.found, reference.found))
        assert _same_training(work, reference)


@pytest.mark.parametrize("home", HOMES)
def test_two_threads_step_disjoint_halves_in_backward(home):
    """Weights and states are those of one thread, and every parameter was stepped at each step."""
    ours, reference = (Halves(HOMES[home](), "in_backward") for _ in range(2))

    with switching_often():
        together(*ours.threads())
    reference.run_in_turn()

    assert _same_training(ours, reference)
    assert {int(state["step"]) for state in _states(ours.optimizer)} == {TURNS}


@pytest.mark.parametrize("mode", ["classic", "in_backward"])
def test_optimizers_that_share_a_disk_step_in_threads_of_their_own(mode):
    """As many optimizers as slabs make their moments at once without a deadlock."""
    home = DiskHome()
    models = [tile(small(), **GRID, home=home) for _ in range(3)]
    optimizers = [optimizer_for(model, mode=mode) for model in models]
    reference = tile(small(), **GRID, home=DiskHome())

    pairs = zip(models, optimizers, strict=True)
    together(*(lambda pair=pair: train(*pair, batches(2)) for pair in pairs))

    train(reference, optimizer_for(reference, mode=mode), batches(2))
    assert all(same(values(model), values(reference)) for model in models)
