"""Asks the kernel to end a process when its parent ends (prctl, PR_SET_PDEATHSIG). Standard library only.

Used by the daemon and the trainer. The "parent" is the thread that started the process. Changing the user id clears
the request.
"""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Sends `number` to this process when its parent ends; too late if it has already ended. Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def ending_with_parent(number: signal.Signals) -> Callable[[], None]:
    """Returns a preexec_fn for Popen that does the same in the child, after a change of user."""
    # Load libc before the fork: little is safe after it.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask_the_kernel() -> None:
        prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)

    return ask_the_kernel
