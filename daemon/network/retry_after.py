"""Interprets error responses for all our HTTP clients: whether to retry, when, and what may be shown of the text."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

LONGEST_SECONDS = 86_400.0
# Timed out, locked, too early, too many: the 4xx statuses that pass by themselves.
_PASSING = frozenset({408, 423, 425, 429})
# Not implemented, HTTP version not supported: the 5xx statuses that do not pass.
_LASTING = frozenset({501, 505})


def is_transient(status: int) -> bool:
    """Whether the same request may succeed a moment later.

    So are server faults: 500 to 504, Storage's 544, Cloudflare's 520 to 527 and 530 for an origin behind it."""
    return status in _PASSING or (status >= 500 and status not in _LASTING)


def is_page(response: httpx.Response) -> bool:
    """Whether the response is an HTML page, usually a proxy's. Its text never goes into a message or a row."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml") or response.content.lstrip()[:9].lower().startswith(
        (b"<!doctype", b"<html")
    )


def said_by_page(status: int) -> str:
    """The text to show in place of an HTML page."""
    whose = ", Cloudflare's for a server that it does not reach" if 520 <= status <= 530 else ""
    return f"HTTP {status}, an HTML error page{whose}"


def retry_after_seconds(response: httpx.Response) -> float:
    """Seconds to wait according to Retry-After; 0 without the header, at most a day."""
    value = response.headers.get("retry-after", "").strip()
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        seconds = (at - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_SECONDS) if math.isfinite(seconds) else 0.0
