"""The states of a job and the table of legal moves, with a reason beside each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """training_jobs.status, in the app's own words."""

    QUEUED = "queued"
    INITIALIZING = "initializing"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNFINISHED = frozenset({State.QUEUED, State.INITIALIZING, State.RUNNING})


HELD = frozenset({State.INITIALIZING, State.RUNNING})


FINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})


@dataclass(frozen=True)
class Move:
    """One legal change of state: its name, the states it may start from, the state it leads to, and its reason."""

    name: str
    origins: frozenset[State]
    target: State
    reason: str


MOVES: tuple[Move, ...] = (
    Move("claim", frozenset({State.QUEUED}), State.INITIALIZING, "a daemon takes the job under a fresh lease"),
    Move("start", frozenset({State.INITIALIZING}), State.RUNNING, "the first optimizer step is done"),
    Move("complete", HELD, State.COMPLETED, "the uploaded adapter was verified"),
    Move("retry", HELD, State.QUEUED, "a transient failure with attempts left: later, with backoff"),
    Move("fail", HELD, State.FAILED, "a failure that another attempt would repeat, or no attempt left"),
    Move("release", HELD, State.QUEUED, "shutdown or preemption: at once, the attempt is given back"),
    Move("return", HELD, State.QUEUED, "the host cannot work: the attempt is given back, up to a limit"),
    Move("cancel", UNFINISHED, State.CANCELLED, "the owner's wish, by UPDATE or by function"),
    Move("reap", HELD, State.QUEUED, "the lease expired: the host died or was cut off"),
    Move("reap_for_good", HELD, State.FAILED, "the lease expired and no attempt is left"),
    Move("resubmit", frozenset({State.FAILED, State.CANCELLED}), State.QUEUED, "the owner or operator tries again"),
)
