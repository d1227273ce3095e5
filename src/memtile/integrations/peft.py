"""PEFT: the frozen base linears become tiles, adapters stay as they are."""

import sys

from torch import nn

from memtile.convert import Integration


def _keeps(model: nn.Module) -> dict[str, str]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return {}
    reason = "it is part of a PEFT adapter, small and trained"
    return {
        f"{name}.{child}" if name else child: reason
        for name, module in model.named_modules()
        if isinstance(module, tuners.BaseTunerLayer)
        for child, _ in module.named_children()
        if child != "base_layer"
    }


PEFT = Integration(keeps=_keeps)
