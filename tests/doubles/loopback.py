"""A small real HTTP/1.1 server on loopback, close enough to the socket to misbehave on purpose: it can answer early,
slowly or with nonsense, or cut the connection at any byte."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

PIECE_BYTES = 64 * 1024


class Cut(Exception):
    """Raised in a handler to end the connection here, without an answer."""


@dataclass
class Exchange:
    """One request and the means to answer it."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    body_left: int = 0
    answered: bool = False

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yields the body as it arrives. Ends early if the client disconnects."""
        while self.body_left:
            piece = await self.reader.read(min(PIECE_BYTES, self.body_left))
            if not piece:
                raise Cut("the client went away")
            self.body_left -= len(piece)
            yield piece

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])

    async def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.start_answer(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.method != "HEAD":
            self.writer.write(body)
        await self.writer.drain()

    def start_answer(self, status: int, headers: Mapping[str, str]) -> None:
        """Writes only the head; the caller writes the body to `writer`."""
        phrase = HTTPStatus(status).phrase if status in {item.value for item in HTTPStatus} else "Unknown"
        lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        if self.body_left:
            lines.append("Connection: close")
        self.writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        self.answered = True


Handler = Callable[[Exchange], Awaitable[None]]


@dataclass
class LoopbackServer:
    """Serves one handler on 127.0.0.1 inside its context. Connections still open at the end are cut."""

    handler: Handler
    tls: ssl.SSLContext | None = None
    port: int = 0
    _server: asyncio.Server | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> LoopbackServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (exchange := await _read_head(reader, writer)) is not None:
                await self.handler(exchange)
                if exchange.body_left:
                    # Answered before the body was read: real servers then close, and the client gets a broken pipe.
                    break
            writer.close()
        except (Cut, ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()
        except asyncio.CancelledError:
            # We are being stopped. Swallow it: asyncio's stream protocol would report it as an error of the handler.
            writer.transport.abort()
        finally:
            self._connections.discard(task)


class LoopbackDouble:
    """The base of a double that answers over HTTP: enter it to serve. A subclass says what `handle` answers."""

    def __init__(self) -> None:
        self.server = LoopbackServer(self.handle)

    async def __aenter__(self) -> Self:
        await self.server.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.server.__aexit__(*exc)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    @property
    def url(self) -> str:
        return self.server.url

    async def handle(self, exchange: Exchange) -> None:
        raise NotImplementedError


async def _read_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *rest = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
    parts = urlsplit(target)
    query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    length = int(headers.get("content-length", "0"))
    return Exchange(method, unquote(parts.path), query, headers, reader, writer, body_left=length)
