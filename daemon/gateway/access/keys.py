"""The bearer keys of the gateway, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256


class KeyRing:
    """The keys that open the gateway, kept as digests."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def find(self, authorization: str) -> int | None:
        """Finds which key this header carries. Compares every key, each in constant time."""
        scheme, _, given = authorization.partition(" ")
        digest = sha256(given.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for place, known in enumerate(self._digests):
            if hmac.compare_digest(known, digest):
                found = place
        return found if scheme.lower() == "bearer" else None
