"""Signs one message as Standard Webhooks prescribes (https://www.standardwebhooks.com): body and headers.

Written here because the library on PyPI mis-signs times that are not UTC, and because it is thirty lines. The tests
verify our signatures with that library.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import SecretStr

from daemon.errors import HostUnfit

# Receivers may refuse more than 20 kB.
MAX_BODY_BYTES = 20_000
# Dropped in this order until the message fits; fields that a receiver decides by are never dropped.
_OPTIONAL = ("error_stack", "metrics", "error_hint")
_LONGEST_TEXT = 2_000
_SMALLEST_KEY_BYTES = 16


def signing_keys(secrets: Sequence[SecretStr]) -> tuple[bytes, ...]:
    """Decodes `whsec_<base64>` secrets; the first key signs first. Raises HostUnfit naming the entry, not its value."""
    keys = []
    for number, secret in enumerate(secrets, start=1):
        text = secret.get_secret_value().removeprefix("whsec_")
        try:
            key = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if len(key) < _SMALLEST_KEY_BYTES:
            raise HostUnfit(
                f"TRAINER_CALLBACK_SECRETS: entry {number} is not whsec_ and at least {_SMALLEST_KEY_BYTES} bytes in "
                "base64; make one with `echo whsec_$(openssl rand -base64 32)`"
            )
        keys.append(key)
    return tuple(keys)


def signed_headers(keys: Sequence[bytes], message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Headers of one try. The id is the same for all tries, the timestamp (seconds, UTC) is new for each."""
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "brightrun-trainer",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
    }
    if keys:
        # One signature per secret, so that receivers can change over while both are valid.
        headers["webhook-signature"] = " ".join(_signature(key, message_id, timestamp, body) for key in keys)
    return headers


def message_body(payload: Mapping[str, Any]) -> bytes:
    """Returns the payload as JSON under MAX_BODY_BYTES. Fields that were dropped are listed in `truncated`."""
    kept = dict(payload)
    body = _json(kept)
    left_out: list[str] = []
    for field in _OPTIONAL:
        if len(body) <= MAX_BODY_BYTES:
            return body
        if kept.pop(field, None) is not None:
            left_out.append(field)
        body = _json({**kept, "truncated": left_out})
    if len(body) <= MAX_BODY_BYTES:
        return body
    for field, value in kept.items():
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            kept[field] = value[:_LONGEST_TEXT] + "…"
            left_out.append(field)
        elif isinstance(value, dict | list) and len(_json(value)) > _LONGEST_TEXT:
            kept[field] = None
            left_out.append(field)
    return _json({**kept, "truncated": left_out})


def _signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str).encode("utf-8", "replace")
