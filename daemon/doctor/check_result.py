"""One line of the doctor's screen: a name, a light, what was seen, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Light(StrEnum):
    GREEN = "ok"
    YELLOW = "warning"
    RED = "fault"


@dataclass(frozen=True)
class Finding:
    """One line of the screen. `advice` says what to do where the light is not green."""

    name: str
    light: Light
    detail: str
    advice: str | None = None


def green(name: str, detail: str) -> Finding:
    return Finding(name, Light.GREEN, detail)


def yellow(name: str, detail: str, advice: str) -> Finding:
    return Finding(name, Light.YELLOW, detail, advice)


def red(name: str, detail: str, advice: str) -> Finding:
    return Finding(name, Light.RED, detail, advice)
