"""Methods of other libraries' classes, for models with tiles in them.

The class is changed, not a model: a model may be put around tiled layers later, and copied, and its
methods know of its tiles all the same. Models without tiles do as ever.
"""

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

from memtile.errors import CannotTileError
from memtile.layers import TiledModule

_MARK = "_knows_tiles"


def with_tiles(cls: Any, name: str, act: Callable[..., Any]) -> None:
    """Let a method of models with tiles be `act(plain, model, …)`; once a class.

    Args:
        cls: the class, which some library has.
        name: the method's.
        act: gets the class's own function first, then what that would get.

    Raises:
        CannotTileError: the method is running at this moment: the class's own, which knows no
            tiles, has begun.
    """
    plain = getattr(cls, name)
    if hasattr(plain, _MARK):
        return

    @functools.wraps(plain)
    def method(model: nn.Module, *args: Any, **kwargs: Any) -> Any:  # as the class's own
        if not any(isinstance(module, TiledModule) for module in model.modules()):
            return plain(model, *args, **kwargs)
        return act(plain, model, *args, **kwargs)

    setattr(method, _MARK, True)
    setattr(cls, name, method)
    if _is_running(getattr(plain, "__code__", None)):
        raise CannotTileError(
            f"{cls.__name__}.{name} was loaded after the tiles were made, and has begun without "
            "knowing them: call it again"
        )


def _is_running(code: object) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
