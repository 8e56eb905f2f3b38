"""Structured logs: an event name and fields, JSON for machines or pretty on a terminal, secrets blotted out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor

BLOT = "[secret]"


def configure_logs(
    level: str = "info",
    style: Literal["auto", "json", "pretty"] = "auto",
    secrets: Iterable[str] = (),
) -> None:
    """Send every log line to stderr; job_id and attempt ride along once bound to the context."""
    pretty = style == "pretty" or (style == "auto" and sys.stderr.isatty())
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if not pretty:
        processors.append(structlog.processors.format_exc_info)
    processors.append(_blot_out(secrets))
    processors.append(structlog.dev.ConsoleRenderer() if pretty else structlog.processors.JSONRenderer())
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


def _blot_out(secrets: Iterable[str]) -> Processor:
    # Shorter than six characters would blot out ordinary words.
    known = sorted({secret for secret in secrets if len(secret) >= 6}, key=len, reverse=True)

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            for secret in known:
                value = value.replace(secret, BLOT)
            return value
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return value

    def processor(_logger: Any, _method: str, event: EventDict) -> EventDict:
        return {key: clean(value) for key, value in event.items()}

    return processor
