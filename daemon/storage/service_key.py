"""What a Supabase key says of itself: whose it is, for which project, until when. Its signature is for the server.

A key that is not the service role's does not fail loudly: Storage's row security answers "not found" to it, and every
job would fail for good as if its dataset were missing.
"""

from __future__ import annotations

import base64
import json
import time
from datetime import UTC, datetime
from typing import Any

import httpx

# The roles of browsers and users. Another role may have been made for a daemon, with policies of its own.
POWERLESS = frozenset({"anon", "authenticated"})
HOSTED = ("supabase.co", "supabase.in")

_WHERE = "the service_role or sb_secret_ key of this project is in its dashboard under Settings, API Keys"


def key_fault(url: str, key: str, *, now: float | None = None) -> str | None:
    """Returns what is wrong with the key of the project at `url`, for the operator, or None. Never quotes the key."""
    if key.startswith("sb_publishable_"):
        return f"SUPABASE_SERVICE_ROLE_KEY is the publishable key, which may read and write nothing here; {_WHERE}"
    claims = _claims_of(key)
    if claims is None:
        return None  # an sb_secret_ key, or one of a kind that we do not know: ask the server
    role, ref, ends = claims.get("role"), claims.get("ref"), claims.get("exp")
    if role in POWERLESS:
        return f"SUPABASE_SERVICE_ROLE_KEY is the {role} key, not the service role's; {_WHERE}"
    project = project_of(url)
    if project is not None and isinstance(ref, str) and ref != project:
        return f"SUPABASE_SERVICE_ROLE_KEY is of the project {ref[:40]}, and SUPABASE_URL names {project}; {_WHERE}"
    if isinstance(ends, int | float) and not isinstance(ends, bool) and ends <= (time.time() if now is None else now):
        return f"SUPABASE_SERVICE_ROLE_KEY has expired{_on_day(ends)}; {_WHERE}"
    return None


def project_of(url: str) -> str | None:
    """Returns the project's ref from its hosted URL; None for a server or domain of one's own."""
    host = httpx.URL(url).host
    name, _, domain = host.partition(".")
    return name if domain in HOSTED else None


def direct_host(url: str) -> str:
    """Returns the host for large files, which bypasses a hosted project's API gateway: <ref>.storage.supabase.co."""
    project = project_of(url)
    return f"https://{project}.storage.{httpx.URL(url).host.partition('.')[2]}" if project is not None else url


def _claims_of(key: str) -> dict[str, Any] | None:
    parts = key.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except ValueError:
        return None
    return claims if isinstance(claims, dict) else None


def _on_day(instant: float) -> str:
    try:
        return f" on {datetime.fromtimestamp(instant, UTC):%Y-%m-%d}"
    except (OverflowError, ValueError, OSError):
        return ""
