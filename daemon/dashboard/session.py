"""Who is signed in to the dashboard: a signed cookie that a gateway key gave, and that dies with the key.

Nothing is stored: a cookie is signed with something made of its key, so it outlives a restart of the
gateway, and taking a key out of TRAINER_GATEWAY_KEYS ends every session that it opened.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Sequence
from hashlib import sha256

COOKIE = "trainer_session"
COOKIE_PATH = "/dashboard"
# A working week; then the key is asked for again.
SESSION_SECONDS = 7 * 24 * 3600
_PURPOSE = b"brightrun-trainer dashboard session 1"


class Sessions:
    """Opens and recognises sessions. Keys are named by their place among the gateway's keys."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._secrets = [hmac.digest(sha256(key.encode()).digest(), _PURPOSE, "sha256") for key in keys]
        self._clock = clock

    def open(self, place: int) -> str:
        """The cookie's value for the key at this place."""
        until = str(int(self._clock()) + SESSION_SECONDS)
        return f"{until}.{self._sign(self._secrets[place], until)}"

    def find(self, value: str) -> int | None:
        """Which key opened this session; None when it is over, or no key of ours did."""
        until, _, signature = value.partition(".")
        if not (until.isascii() and until.isdigit() and len(until) <= 12 and signature.isascii()):
            return None
        found = None
        for place, secret in enumerate(self._secrets):
            if hmac.compare_digest(self._sign(secret, until), signature):
                found = place
        return found if int(until) > self._clock() else None

    @staticmethod
    def _sign(secret: bytes, until: str) -> str:
        return hmac.new(secret, until.encode(), sha256).hexdigest()


def cookie_value(header: str) -> str:
    """The session's value in a Cookie header; empty without one."""
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""
