"""Asks the kernel to end a process when its parent ends (prctl, PR_SET_PDEATHSIG). Standard library only.

Daemon and trainer use it. The "parent" is the thread that started the process, and a change of user clears the request.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Send this process the signal when its parent ends; one that has ended already is not noticed. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def ending_with_parent(number: signal.Signals) -> Callable[[], None]:
    """The same for a child that is about to be started: Popen's preexec_fn, which runs after a change of user."""
    # Loaded before the fork: after it little is safe.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)

    return ask_the_kernel
