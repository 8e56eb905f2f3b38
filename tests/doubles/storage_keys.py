"""The keys of a project's double: JWTs signed with the project's secret, the newer keys that are none, and the gateway
that exchanges the newer for the older."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SECRET = b"super-secret-jwt-token-of-the-double-with-32-characters"
EXPIRES_AT = 4102444800  # the year 2100


def _packed(value: Mapping[str, Any]) -> str:
    return _encoded(json.dumps(value, separators=(",", ":")).encode())


def _encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def make_key(role: str, *, secret: bytes = SECRET, **claims: Any) -> str:
    """A project's JWT key as Supabase makes them. `ref` is the project, where it is hosted."""
    payload = {"iss": "supabase", "role": role, "iat": 1767225600, "exp": EXPIRES_AT} | claims
    signed = f"{_packed({'alg': 'HS256', 'typ': 'JWT'})}.{_packed(payload)}"
    return f"{signed}.{_encoded(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


SERVICE_KEY = make_key("service_role")
ANON_KEY = make_key("anon")
# The newer kind: no JWTs. The gateway knows them, Storage behind it does not.
SECRET_KEY = "sb_secret_of-the-double_0001"
PUBLISHABLE_KEY = "sb_publishable_of-the-double_0001"


class KeyRefused(Exception):
    """The text is Storage's own, of the library that it verifies tokens with."""


class GatewayRefuses(Exception):
    """The gateway in front answers, not Storage: 401 with a body of its own shape."""


@dataclass
class Gate:
    """Who is asking: Storage reads `Authorization` alone; `apikey` is read by the gateway in front."""

    secret: bytes = SECRET
    clock: Any = time.time

    def through_gateway(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers as the gateway passes them on: a newer key becomes the JWT of its role."""
        key = headers.get("apikey", "")
        if not key:
            raise GatewayRefuses("No API key found in request")
        if not key.startswith("sb_"):
            return {"authorization": f"Bearer {key}", **headers}
        role = {SECRET_KEY: "service_role", PUBLISHABLE_KEY: "anon"}.get(key)
        if role is None:
            raise GatewayRefuses("Unregistered API key")
        return {**headers, "authorization": f"Bearer {make_key(role, secret=self.secret)}"}

    def role(self, headers: Mapping[str, str]) -> str:
        token = headers.get("authorization", "").removeprefix("Bearer ").strip()
        parts = token.split(".")
        if len(parts) != 3:
            raise KeyRefused("Invalid Compact JWS")
        signed = f"{parts[0]}.{parts[1]}".encode()
        if parts[2] != _encoded(hmac.digest(self.secret, signed, hashlib.sha256)):
            raise KeyRefused("signature verification failed")
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        if claims["exp"] <= self.clock():
            raise KeyRefused('"exp" claim timestamp check failed')
        return str(claims["role"])
