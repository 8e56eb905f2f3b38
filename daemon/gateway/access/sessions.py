"""Who is signed in to the dashboard: a signed cookie that a gateway key gave, and that dies with the key.

What opens a session is stored nowhere: a cookie is signed with something made of its key, so it outlives a restart
of the gateway, and taking a key out of TRAINER_GATEWAY_KEYS ends every session that it opened. Signing out is
remembered for as long as the cookie would have lasted, by this process: a copy of it opens nothing any more. A
gateway that starts anew has forgotten it, which is why a session lasts a working day and no longer.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from hashlib import sha256

COOKIE = "trainer_session"
COOKIE_PATH = "/dashboard"
# A working day; then the key is asked for again.
SESSION_SECONDS = 12 * 3600
_PURPOSE = b"brightrun-trainer dashboard session 2"


class Sessions:
    """Opens, recognises and ends sessions. Keys are named by their place among the gateway's keys."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._secrets = [hmac.digest(sha256(key.encode()).digest(), _PURPOSE, "sha256") for key in keys]
        self._clock = clock
        # Cookies that were signed out, and when each would have ended by itself.
        self._ended: dict[str, int] = {}

    def open(self, place: int) -> str:
        """The cookie's value for the key at this place: until when, a number of its own, a signature over both."""
        words = f"{int(self._clock()) + SESSION_SECONDS}.{secrets.token_hex(16)}"
        return f"{words}.{self._sign(self._secrets[place], words)}"

    def find(self, value: str) -> int | None:
        """Which key opened this session; None when it is over, was signed out, or no key of ours opened it."""
        words, _, signature = value.rpartition(".")
        until = words.partition(".")[0]
        if not (value.isascii() and until.isdigit() and len(until) <= 12):
            return None
        found = None
        for place, secret in enumerate(self._secrets):
            if hmac.compare_digest(self._sign(secret, words), signature):
                found = place
        return found if int(until) > self._clock() and value not in self._ended else None

    def end(self, value: str) -> None:
        """Sign this session out. Only what a key of ours has opened is remembered."""
        if self.find(value) is None:
            return
        now = self._clock()
        self._ended = {ended: until for ended, until in self._ended.items() if until > now}
        self._ended[value] = int(value.partition(".")[0])

    @staticmethod
    def _sign(secret: bytes, words: str) -> str:
        return hmac.new(secret, words.encode(), sha256).hexdigest()


def cookie_value(header: str) -> str:
    """The session's value in a Cookie header; empty without one."""
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""
