"""The hooks of in-backward mode: a parameter is stepped once its gradient is complete."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from memtile.transfer import gradient_lock, step_in_backward

Step = Callable[[nn.Parameter], None]
Hooked = tuple["weakref.ref[nn.Parameter]", RemovableHandle]


def hook(parameters: Iterable[nn.Parameter], step: "Callable[[], Step | None]") -> list[Hooked]:
    """Have these stepped in backward, for as long as the weak reference gives the step."""
    hooked: list[Hooked] = []
    for parameter in parameters:
        if parameter.requires_grad:
            act = partial(_step_after_backward, step, gradient_lock(parameter))
            handle = parameter.register_post_accumulate_grad_hook(act)
            hooked.append((weakref.ref(parameter), handle))
            step_in_backward(parameter, True)
    return hooked


def remove(hooks: list[Hooked]) -> None:
    """Undo `hook`."""
    for reference, handle in hooks:
        handle.remove()
        parameter = reference()
        if parameter is not None:
            step_in_backward(parameter, False)


def _step_after_backward(
    reference: Callable[[], Step | None], lock: AbstractContextManager[object], parameter: Tensor
) -> None:
    """The hook; the lock is the parameter's `gradient_lock`."""
    step = reference()
    if step is None:
        return
    with lock:
        if parameter.grad is not None:
            assert isinstance(parameter, nn.Parameter)
            step(parameter)
            parameter.grad = None
