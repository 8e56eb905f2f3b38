"""One line of the doctor's screen: a name, a status, what was found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from daemon.sentence import as_sentence


class Status(StrEnum):
    GREEN = "ok"
    YELLOW = "warning"
    RED = "fault"


@dataclass(frozen=True)
class CheckResult:
    """One line of the screen. `advice` says what to do if the status is not green."""

    name: str
    light: Status
    detail: str
    advice: str | None = None


def green(name: str, detail: str) -> CheckResult:
    return CheckResult(name, Status.GREEN, detail)


def yellow(name: str, detail: str, advice: str) -> CheckResult:
    return CheckResult(name, Status.YELLOW, as_sentence(detail), as_sentence(advice))


def red(name: str, detail: str, advice: str) -> CheckResult:
    return CheckResult(name, Status.RED, as_sentence(detail), as_sentence(advice))
