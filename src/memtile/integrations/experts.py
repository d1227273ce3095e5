"""Stacks of experts of transformers' models: which parameters they are, and their forward on tiles.

transformers' `use_experts_implementation` marks the classes and says how they compute. Values are
those of its `batched_mm` form: each token's results are multiplied by their routing weights and
summed over its experts, then cast.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from memtile import ops
from memtile.convert import Stack
from memtile.geometry import partition_uniform
from memtile.layers import StackOwner, TiledStack, called_experts

_MARKS = ("has_gate", "has_bias", "is_transposed", "_is_expert_parallel", "num_experts")
_PARALLEL = ("transformers.models.jetmoe.modeling_jetmoe", "JetMoeParallelExperts")
_USED = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def stacks_of(module: nn.Module) -> Mapping[str, Stack]:
    """The stacks of experts among a module's own parameters."""
    if _is_parallel(module) and "weight" in module._parameters:
        experts = module._parameters["weight"].shape[0]  # type: ignore[union-attr]  # not None
        return {"weight": Stack(TiledParallelExperts, False, experts, False)}
    if any(mark not in vars(module) for mark in _MARKS):
        return {}
    known: Any = module  # as transformers' decorator leaves it
    used = (getattr(known.config, name, None) for name in _USED)
    at_most = next((count for count in used if isinstance(count, int)), known.num_experts)
    reads_values = known.config._experts_implementation not in ("batched_mm", "grouped_mm")
    stack = Stack(TiledExperts, bool(known.is_transposed), at_most, reads_values)
    found = {name: module._parameters.get(name) for name in _names(known)}
    return {name: stack for name, p in found.items() if p is not None and p.dim() == 3}


def _names(module: Any) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _is_parallel(module: nn.Module) -> bool:
    """Whether it is a stack alone, called with rows that are grouped by expert (JetMoE)."""
    cls = getattr(module, "dense_class", type(module))
    return (cls.__module__, cls.__name__) == _PARALLEL


class TiledParallelExperts(StackOwner):
    """The forward of a `JetMoeParallelExperts` whose weight is in tiles."""

    weight: TiledStack

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """(N, out) of rows (N, in) that are grouped by expert, so many for each."""
        result: Tensor = self.weight(inputs, expert_size)
        return result


class TiledExperts(StackOwner):
    """The forward of an experts module with tiles: experts that no token is routed to stay away."""

    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, k), each token's experts; numbers from E on mean none.
            top_k_weights: (T, k).

        Returns:
            (T, H), in the dtype of `hidden_states`.
        """
        routes = _Routes.of(top_k_index, self.num_experts, hidden_states.is_meta)
        tokens, width = top_k_index.shape[0], top_k_index.shape[-1]
        experts = _Experts(self)
        called = called_experts(list(experts.stacks.values()), routes.counts)
        blocks = [(first, last) for first, last in experts.blocks() if any(called[first:last])]
        sizes = [routes.rows(*block) for block in blocks]
        used = [weight for block in blocks for weight in experts.used(routes.counts, *block)]
        weights = top_k_weights.reshape(-1)[routes.pairs].unsqueeze(-1)
        parts = zip(
            blocks,
            routes.pairs.split(sizes),
            weights.split(sizes),
            _states(hidden_states, routes.pairs, width, sizes),
            strict=True,
        )
        out: Tensor | None = None
        for (first, last), pairs, weight, x in parts:
            y = experts(x, routes.counts[first:last], first, used, called[first:last]) * weight
            if out is None:
                out = y.new_zeros((tokens * width, y.shape[-1]))  # also where a pair has no expert
            out = ops.place_rows(out, y, pairs)
        if out is None:
            return torch.zeros_like(hidden_states)
        return out.view(tokens, width, -1).sum(1).to(hidden_states.dtype)


@dataclass(frozen=True)
class _Routes:
    """The (token, expert) pairs of a forward, sorted by expert."""

    pairs: Tensor  # numbers token · k + place
    counts: tuple[int, ...]  # pairs of each expert

    @classmethod
    def of(cls, top_k_index: Tensor, experts: int, is_meta: bool) -> "_Routes":
        """The routes of (T, k) experts; with shapes alone, pairs are spread evenly."""
        if is_meta or top_k_index.is_meta:
            bounds = partition_uniform(top_k_index.numel(), experts)
            pairs = torch.arange(bounds[-1], device="meta")
            return cls(pairs, tuple(stop - start for start, stop in pairwise(bounds)))
        ids = top_k_index.reshape(-1)
        counts = torch.bincount(ids.clamp(max=experts), minlength=experts + 1)[:experts].tolist()
        return cls(ids.argsort(stable=True)[: sum(counts)], tuple(counts))

    def rows(self, first: int, last: int) -> int:
        """How many pairs some experts have."""
        return sum(self.counts[first:last])


def _states(hidden: Tensor, pairs: Tensor, width: int, sizes: Sequence[int]) -> Iterator[Tensor]:
    """The input of each block's pairs: at once where backward would sum the blocks' gradients."""
    each = hidden.unsqueeze(1).expand(-1, width, -1)  # so that sums over a token's experts are one
    tokens, places = pairs // width, pairs % width
    if hidden.requires_grad and torch.is_grad_enabled():
        yield from each[tokens, places].split(sizes)
        return
    for some in tokens.split(sizes):
        yield hidden[some]


class _Experts:
    """What an experts module does to rows that are grouped by expert."""

    def __init__(self, module: Any) -> None:  # as transformers' decorator leaves it
        self.module = module
        self.names = _names(module)
        held: dict[str, Any] = {name: getattr(module, name) for name in self.names}
        self.stacks = {name: s for name, s in held.items() if isinstance(s, TiledStack)}
        self.matrices: dict[str, tuple[Tensor, ...]] = {
            name: (weight.mT if module.is_transposed else weight).unbind(0)
            for name, weight in held.items()
            if name not in self.stacks
        }
        self.biases: dict[str, tuple[Tensor, ...]] = {
            name: getattr(module, f"{name}_bias").unbind(0) if module.has_bias else ()
            for name in self.names
        }

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Runs of experts (first, stop) that tiles of both stacks begin and end with."""
        bounds = [stack.bounds for stack in self.stacks.values()]
        common = frozenset.intersection(*bounds) if bounds else {0, self.module.num_experts}
        return pairwise(sorted(common))

    def used(self, counts: Sequence[int], first: int, last: int) -> Iterator[Tensor]:
        """The weights of the tiles that a block's experts need, in order."""
        for name in self.names:
            if name in self.stacks:
                yield from self.stacks[name].used(counts[first:last], first)

    def __call__(
        self,
        x: Tensor,
        counts: Sequence[int],
        first: int,
        used: Sequence[Tensor],
        called: Sequence[bool],
    ) -> Tensor:
        """(N, H) of (N, H)."""
        module = self.module
        up, down = self.names
        x = self._product(up, x, counts, first, used, called)
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        x = self._product(down, x, counts, first, used, called)
        y: Tensor = module.post_expert_norm(x) if module.has_post_expert_norm else x
        return y

    def _product(
        self,
        name: str,
        x: Tensor,
        counts: Sequence[int],
        first: int,
        used: Sequence[Tensor],
        called: Sequence[bool],
    ) -> Tensor:
        last = first + len(counts)
        y: Tensor
        if name in self.stacks:
            y = self.stacks[name](x, counts, first, used, called)
        else:
            y = ops.grouped_linear(x, self.matrices[name][first:last], counts)
        pairs = zip(self.biases[name][first:last], counts, strict=False)
        biases = [bias.expand(count, -1) for bias, count in pairs if count]
        return y + torch.cat(biases).to(y.dtype) if biases else y
