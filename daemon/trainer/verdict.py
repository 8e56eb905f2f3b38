"""Turns exit code, signal, last event and silence into one verdict."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daemon.queue.outcome import Failed
from daemon.stop_request import StopReason
from training import events
from training.events import EXIT_STOPPED, ErrorCode


@dataclass(frozen=True)
class Trained:
    """The child saved an adapter and exited cleanly."""

    adapter_dir: Path
    summary: dict[str, Any] = field(default_factory=dict)
    serving: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stopped:
    """The child ended because of our stop request, for this `reason`."""

    reason: StopReason


Verdict = Trained | Stopped | Failed


def verdict_of(
    returncode: int,
    terminal: events.AdapterSaved | events.RunFailed | None,
    *,
    stop_reason: StopReason | None,
    stalled_seconds: float | None,
    log_tail: str,
) -> Verdict:
    """Turns exit code, signal, last event and silence into one verdict.

    Success needs both a saved adapter and a clean exit; either one alone is a failure.
    """
    if isinstance(terminal, events.AdapterSaved) and returncode == 0:
        return Trained(Path(terminal.path), terminal.summary, terminal.serving)
    if stop_reason is not None:
        return Stopped(stop_reason)
    if stalled_seconds is not None:
        return Failed(
            ErrorCode.STALLED,
            f"The trainer reported nothing for {stalled_seconds:.0f} s and was stopped.",
            hint="The job is tried again. If it stalls at the same step every time, lower batch_size or max_length.",
            stack=log_tail,
            transient=True,
        )
    if isinstance(terminal, events.RunFailed):
        stack = "\n".join(part for part in (terminal.stack, log_tail) if part)
        return Failed(terminal.code, terminal.message, terminal.hint, stack, terminal.transient, terminal.host)
    if returncode == EXIT_STOPPED:
        # Another process sent it a SIGTERM (the platform, an operator): treated as a release.
        return Stopped(StopReason.SHUTDOWN)
    if returncode < 0:
        name = signal.Signals(-returncode).name
        return Failed(
            ErrorCode.INTERNAL,
            f"The trainer was killed by {name}.",
            hint="The job is tried again. SIGKILL usually means that the host ran out of memory; its log says more.",
            stack=log_tail,
            transient=True,
        )
    return Failed(
        ErrorCode.INTERNAL,
        f"The trainer ended with exit code {returncode} and reported no error.",
        hint="This is a fault of the service, not of your job. The job is tried again.",
        stack=log_tail,
        transient=True,
    )
