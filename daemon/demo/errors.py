"""The error of a demo that cannot continue."""

from __future__ import annotations


class DemoFailed(Exception):
    """What went wrong and what to do; `detail` is the end of a log, or empty."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
