"""Dashboard sessions: a signed cookie that is bound to the gateway key it was opened with.

Sessions are not stored. A cookie is signed with a secret derived from its key, so it stays valid after a restart of the
gateway, and removing a key from TRAINER_GATEWAY_KEYS ends every session that it opened. This process remembers a
signed-out cookie until it would have expired, so that copies of it are useless. A restarted gateway has forgotten it,
which is why a session lasts only a working day.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from hashlib import sha256

COOKIE = "trainer_session"
COOKIE_PATH = "/dashboard"
# A working day; then the user must enter the key again.
SESSION_SECONDS = 12 * 3600
_PURPOSE = b"brightrun-trainer dashboard session 2"


class Sessions:
    """Opens, recognises and ends sessions. A key is identified by its position among the gateway's keys."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._secrets = [hmac.digest(sha256(key.encode()).digest(), _PURPOSE, "sha256") for key in keys]
        self._clock = clock
        # Cookies that were signed out, and when each would have expired.
        self._ended: dict[str, int] = {}

    def open(self, place: int) -> str:
        """Makes the cookie for the key at this position: expiry, a unique number, and a signature over both."""
        words = f"{int(self._clock()) + SESSION_SECONDS}.{secrets.token_hex(16)}"
        return f"{words}.{self._sign(self._secrets[place], words)}"

    def find(self, value: str) -> int | None:
        """Finds the key that opened this session. None if it expired, was signed out, or none of our keys opened it."""
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
        """Signs this session out. Only sessions that our keys opened are remembered."""
        if self.find(value) is None:
            return
        now = self._clock()
        self._ended = {ended: until for ended, until in self._ended.items() if until > now}
        self._ended[value] = int(value.partition(".")[0])

    def mark_of(self, place: int) -> str:
        """Eight digits that tell what the holders of this key wrote from what those of another did."""
        return self._sign(self._secrets[place], "mark")[:8]

    @staticmethod
    def _sign(secret: bytes, words: str) -> str:
        return hmac.new(secret, words.encode(), sha256).hexdigest()


def cookie_value(header: str) -> str:
    """The session's value in a Cookie header; empty if there is none."""
    for part in header.split(";"):
        name, _, value = part.strip().partition("=")
        if name == COOKIE:
            return value
    return ""
