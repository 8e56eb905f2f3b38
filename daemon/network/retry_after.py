"""What a bad answer of a server means for every HTTP client of ours: whether to ask again, when, and what it said."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

LONGEST_SECONDS = 86_400.0
# Timed out, locked, too early, too many: of all that a server says of a request, what passes by itself.
_PASSING = frozenset({408, 423, 425, 429})
# Not implemented, another version of HTTP: said again each time.
_LASTING = frozenset({501, 505})


def is_transient(status: int) -> bool:
    """Whether the same request may be answered otherwise a moment later.

    A trouble of the server's is: 500 to 504, Storage's 544, Cloudflare's 520 to 527 and 530 for an origin behind it."""
    return status in _PASSING or (status >= 500 and status not in _LASTING)


def is_page(response: httpx.Response) -> bool:
    """An answer written for a browser, a proxy's as a rule. Its text never goes into a message or a row."""
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml") or response.content.lstrip()[:9].lower().startswith(
        (b"<!doctype", b"<html")
    )


def said_by_page(status: int) -> str:
    """What a message says instead of a page's text."""
    whose = ", Cloudflare's for a server that it does not reach" if 520 <= status <= 530 else ""
    return f"HTTP {status}, an HTML error page{whose}"


def retry_after_seconds(response: httpx.Response) -> float:
    """Seconds until the server wants to hear from us again; 0 when it does not say, at most a day."""
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
