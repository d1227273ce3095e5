"""Heads that give `DeferredLogits`: linears, tiled or not, of which models compute their logits."""

from typing import Any, ClassVar, Final, TypeGuard

from torch import Tensor, nn

from memtile import ops
from memtile.layers import checks
from memtile.layers.deferred_logits import DeferredLogits
from memtile.layers.deferred_results import hide_from_ddp
from memtile.layers.gathered_calls import has_only_hooks_of_engines
from memtile.layers.tiled_linear import TiledLinear

# Fewer logits are computed at once: a loss without them has as many in memory, and more work.
LEAST_LOGITS: Final = ops.LOGIT_ELEMENTS


class DeferringHead(nn.Module):
    """A head that gives `DeferredLogits`; what it computes is what `acts_as` does.

    Attributes:
        defers_in_engine: an engine's hooks wait until logits or loss are computed, on each rank
            alike: however few logits they are.
        steps_of_engine: what it has stepped without writing to parameters that torch sees.
    """

    acts_as: ClassVar[type[nn.Module]]
    is_on: bool = True
    defers_in_engine: bool = False
    steps_of_engine: int = 0
    out_features: int

    def __call__(self, *given: Any, **named: Any) -> Any:  # the input, under any name it has
        """Logits (…, V) of hidden states (…, H), deferred where there are many."""
        input = next(iter((*given, *named.values())), None)
        if not self._defers(input):
            return super().__call__(*given, **named)
        hide_from_ddp()
        return DeferredLogits.of(self, input)

    def now(self, input: Tensor) -> Tensor:
        """The logits, computed at once."""
        found: Tensor = super().__call__(input)
        return found

    def _defers(self, input: Any) -> TypeGuard[Tensor]:
        return (
            self.is_on
            and type(input) is Tensor
            and input.dim() > 1
            and (self.defers_in_engine or input[..., 0].numel() * self.out_features > LEAST_LOGITS)
            and not ops.transformed()
            and not checks.hooked_globally()
            and self._waits_for_use()
        )

    def _waits_for_use(self) -> bool:
        """Whether nothing is to happen when it is called: an engine's hooks may come later."""
        by_engine = self.defers_in_engine and has_only_hooks_of_engines(self)
        return by_engine or not checks.has_hooks(self)


class DeferringLinear(DeferringHead, nn.Linear):
    """`nn.Linear` as a head that defers its logits."""

    acts_as = nn.Linear


class DeferringTiledLinear(DeferringHead, TiledLinear):
    """`TiledLinear` as a head that defers its logits."""

    acts_as = TiledLinear


def defer_in_engine(model: nn.Module) -> list[DeferringHead]:
    """Let the heads in a model that an engine has hooked wait for what uses logits; gives them.

    Not where the model is a head itself, whose call the engine waits for.
    """
    inner = (module for module in model.modules() if module is not model)
    heads = [module for module in inner if isinstance(module, DeferringHead)]
    for head in heads:
        head.defers_in_engine = True
    return heads


def set_deferring(head: nn.Module, on: bool) -> bool:
    """Have a linear, tiled or not, defer its logits, or not any more; False for other classes."""
    known = isinstance(head, DeferringHead)
    for cls in (DeferringLinear, DeferringTiledLinear):
        if type(head) in (cls, cls.acts_as):
            head.__class__, known = (cls if on else cls.acts_as), True
    if isinstance(head, DeferringHead):
        head.is_on = on  # also where FSDP2 has made a class of its own of it
    return known
