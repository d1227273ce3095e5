"""`save_pretrained` of other libraries' classes, for models with tiles in them: dense checkpoints.

The class is changed, not a model: a model may be put around tiled layers later, and copied, and it
saves its tiles as dense weights all the same. Models without tiles are saved as ever.
"""

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

from memtile.errors import CannotTileError
from memtile.layers import TiledModule

_MARK = "_writes_tiles_dense"


def write_dense(cls: Any, save: Callable[..., Any]) -> None:
    """Let `cls.save_pretrained` save models with tiles by `save(plain, model, …)`; once a class.

    Args:
        cls: the class, which some library has.
        save: gets the class's own function first, then what that would get.

    Raises:
        CannotTileError: the class is saving a model at this moment: its own function, which knows
            no tiles, has begun.
    """
    plain = cls.save_pretrained
    if hasattr(plain, _MARK):
        return

    @functools.wraps(plain)
    def save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> Any:  # as the class's own
        if not any(isinstance(module, TiledModule) for module in model.modules()):
            return plain(model, *args, **kwargs)
        return save(plain, model, *args, **kwargs)

    setattr(save_pretrained, _MARK, True)
    cls.save_pretrained = save_pretrained
    if _is_running(getattr(plain, "__code__", None)):
        raise CannotTileError(
            f"{cls.__name__}.save_pretrained was loaded after the tiles were made, and would write "
            "their names: call it again, it writes the dense checkpoint from now on"
        )


def _is_running(code: object) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
