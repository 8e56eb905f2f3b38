"""Structured logs: an event name and fields, as JSON or pretty-printed for a terminal, with every secret masked."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import structlog
from structlog.typing import Processor

if TYPE_CHECKING:
    from daemon.settings import Settings

BLOT = "[secret]"


def configure_logs_by(settings: Settings, more_secrets: Iterable[str] = ()) -> None:
    """Configures logging from the settings, masks every secret in them, and logs what was left out of a setting."""
    from daemon.read_settings import notices_of, secrets_of

    configure_logs(settings.log_level, settings.log_format, (*secrets_of(settings), *more_secrets))
    for notice in notices_of(settings):
        structlog.get_logger().warning("database_url_notice", notice=notice)


def configure_logs(
    level: str = "info",
    style: Literal["auto", "json", "pretty"] = "auto",
    secrets: Iterable[str] = (),
) -> None:
    """Sends every log line to stderr. job_id and attempt are part of each line once they are bound to the context."""
    pretty = style == "pretty" or (style == "auto" and sys.stderr.isatty())
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        # Before masking, and as text: the pretty renderer would format it afterwards, with each frame's variables.
        structlog.processors.format_exc_info,
    ]
    clean = _cleaner(secrets)
    processors.append(lambda _logger, _method, event: {key: clean(value) for key, value in event.items()})
    processors.append(
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if pretty
        else structlog.processors.JSONRenderer()
    )
    # Log lines of libraries: uvicorn's stacks, asyncio's exceptions that were never retrieved.
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_BlottingFormatter(clean))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


class _BlottingFormatter(logging.Formatter):
    def __init__(self, clean: Callable[[Any], Any]) -> None:
        super().__init__()
        self._clean = clean

    def format(self, record: logging.LogRecord) -> str:
        return str(self._clean(super().format(record)))


def _cleaner(secrets: Iterable[str]) -> Callable[[Any], Any]:
    # Masking a secret of fewer than six characters would mask ordinary words.
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

    return clean
