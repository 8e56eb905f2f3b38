"""Checks every request before a route sees it: its key, its rate, and the size and arrival time of its body.

In this order, so that a caller without a key costs one hash and no body. It is plain ASGI, because it must
refuse a body that is still arriving.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daemon.gateway.access.keys import KeyRing
from daemon.gateway.access.rate_limit import Bucket
from daemon.gateway.access.sessions import COOKIE_PATH, Sessions, cookie_value
from daemon.gateway.schemas import Problem

# For load balancers and people; they contain no user's data.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/dashboard"})
# The page itself contains no data.
OPEN_FOLDER = "/dashboard/static/"
# The key is in the body, so every login counts as a call without a key.
LOGIN_PATH = "/dashboard/login"
BODY_SECONDS = 10.0
# Callers without a key share one bucket: guessing keys is slow for all together, and callers with a key are unaffected.
STRANGERS_PER_SECOND = 20.0


class Gate:
    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Sequence[str],
        sessions: Sessions,
        requests_per_second: float,
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._keys = KeyRing(keys)
        self._sessions = sessions
        self._buckets = [Bucket(requests_per_second) for _ in keys]
        self._strangers = Bucket(STRANGERS_PER_SECOND)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            await self._app(scope, receive, send)
            return
        key = None if path == LOGIN_PATH else self._keys.find(_header(scope, b"authorization"))
        if key is None and path.startswith(COOKIE_PATH + "/") and path != LOGIN_PATH:
            key = self._sessions.find(cookie_value(_header(scope, b"cookie")))
        seconds = (self._strangers if key is None else self._buckets[key]).take()
        if seconds > 0:
            await _refuse(
                429, "Too many requests.", "Wait as long as Retry-After says.", {"Retry-After": str(math.ceil(seconds))}
            )(scope, receive, send)
            return
        if key is None and path != LOGIN_PATH:
            await _refuse(
                401, "A valid key is needed.", "Send Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"}
            )(scope, receive, send)
            return
        body = await self._read_body(scope, receive)
        if not isinstance(body, bytes):
            await body(scope, receive, send)
            return
        await self._app(_as_json(scope), _replay(body, receive), send)

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes | JSONResponse:
        too_large = _refuse(
            413,
            f"The body is larger than {self._max_body_bytes} bytes.",
            "Datasets are named by dataset_url, never sent along.",
            # The rest of the body is not read, so this connection cannot be reused.
            {"Connection": "close"},
        )
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            return too_large
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return _refuse(400, "The request ended before its body did.", None, {})
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > self._max_body_bytes:
                        return too_large
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            return _refuse(
                408, f"The body did not arrive within {BODY_SECONDS:.0f} s.", "Send it again.", {"Connection": "close"}
            )


def _header(scope: Scope, name: bytes) -> str:
    for given, value in scope["headers"]:
        if given == name:
            return bytes(value).decode("latin-1")
    return ""


def _as_json(scope: Scope) -> Scope:
    # Older callers send no Content-Type, or their library's text/plain. A body here is always JSON.
    others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*others, (b"content-type", b"application/json")]}


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _refuse(status: int, error: str, hint: str | None, headers: dict[str, str]) -> JSONResponse:
    return JSONResponse(Problem(error=error, hint=hint).model_dump(exclude_none=True), status, headers)
