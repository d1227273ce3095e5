"""What a forked child of the tests' own process does."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable


def child_says(act: Callable[[], bool]) -> bool:
    """Whether the act is true in a child; one that hangs is ended by its alarm."""
    with warnings.catch_warnings():  # that there are threads, which the child does not use
        warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
        child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        code = 2
        try:
            code = 0 if act() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
