"""What would be lost if a module were replaced by another one."""

import types

from torch import nn

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
