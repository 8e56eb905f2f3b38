"""Server-sent events for one browser: a bounded queue, and a response that ends when the stream does.

A browser that does not keep up is disconnected. It reconnects by itself and gets everything again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# About half a minute of a busy page.
MOST_WAITING = 100

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    # nginx and RunPod's proxy would hold events back otherwise.
    "X-Accel-Buffering": "no",
}


def message(event: str, data: str, number: str | None = None) -> bytes:
    """Encodes one event. `data` is JSON, which contains no line break."""
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {event}\ndata: {data}\n\n".encode()


class Client:
    """The messages that wait for one browser. `is_welcome` is checked before each send."""

    def __init__(self, is_welcome: Callable[[], bool]) -> None:
        self.is_welcome = is_welcome
        self._waiting: deque[bytes] = deque()
        self._news = asyncio.Event()
        self.ended = asyncio.Event()

    def offer(self, text: bytes) -> None:
        """Queues a message; ends the stream if too many wait."""
        if self.ended.is_set():
            return
        if len(self._waiting) >= MOST_WAITING:
            self.end()
            return
        self._waiting.append(text)
        self._news.set()

    def end(self) -> None:
        self.ended.set()
        self._news.set()

    async def take(self) -> bytes | None:
        """Returns all waiting messages together; None if the stream has ended."""
        await self._news.wait()
        if self.ended.is_set():
            return None
        self._news.clear()
        text = b"".join(self._waiting)
        self._waiting.clear()
        return text


class EventStream(Response):
    """Sends a client's messages until it leaves, falls behind, or the stream is ended."""

    def __init__(self, client: Client, leave: Callable[[Client], None]) -> None:
        super().__init__(headers=HEADERS)
        # A streaming response has no Content-Length.
        del self.headers["content-length"]
        self._client = client
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        work = [
            asyncio.ensure_future(self._send_all(send)),
            asyncio.ensure_future(_gone(receive)),
            asyncio.ensure_future(self._client.ended.wait()),
        ]
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            if self._client.ended.is_set():
                # A moment to finish cleanly; do not wait for a browser that reads nothing.
                await asyncio.wait(work[:2], timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._leave(self._client)
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while (text := await self._client.take()) is not None:
            await send({"type": "http.response.body", "body": text, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
