"""A TCP proxy on loopback that can be cut, or left half open: connected on both sides but carrying nothing.

A half-open connection is what a lost NAT entry or a frozen host leaves behind: no end, no error, no data.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

T = TypeVar("T")
# The startup packet (with application_name) is within what a client sends before its password.
_STARTUP_BYTES = 4096


class _Connection:
    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.sides = (client, server)
        self.startup = b""
        self.flowing = asyncio.Event()
        self.flowing.set()

    def is_of(self, application: str | None) -> bool:
        return application is None or b"application_name\0" + application.encode() + b"\0" in self.startup

    def cut(self) -> None:
        for side in self.sides:
            side.transport.abort()


class TcpProxy:
    """Listens in front of one port of 127.0.0.1; a context manager. Tells connections apart by application_name."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._connections: set[_Connection] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._partitioned = False
        self.port = 0
        # Connections attempted so far, including unanswered ones.
        self.asked = 0

    def __enter__(self) -> TcpProxy:
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_exception: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def dsn(self, dsn: str) -> str:
        """Returns the same URL, through this proxy."""
        parts = urlsplit(dsn)
        login = parts.netloc.rpartition("@")[0]
        return urlunsplit(parts._replace(netloc=f"{login}@127.0.0.1:{self.port}"))

    def half_open(self, application: str | None = None) -> int:
        """Makes the live connections (of that application) carry nothing from now on. Returns how many."""

        def freeze(connection: _Connection) -> None:
            connection.flowing.clear()

        return self._call(self._each(freeze, application))

    def hold_back(self) -> None:
        """Delays everything on the live connections until `let_go`; then it all arrives, late but complete.

        A pooler does the same with its clients' statements while its server is away."""
        self.half_open()

    def let_go(self) -> None:
        """Delivers what was held back."""
        self._call(self._each(lambda connection: connection.flowing.set(), None))

    def cut(self, application: str | None = None) -> int:
        """Resets the live connections (of that application) and accepts new ones. Returns how many."""
        return self._call(self._each(_Connection.cut, application))

    def connected(self, application: str | None = None) -> int:
        """Returns the number of connections."""
        return self._call(self._each(lambda _connection: None, application))

    def partition(self) -> None:
        """Makes every connection half open, new ones too, until `heal`."""
        self._partitioned = True
        self.half_open()

    def heal(self) -> None:
        """Resets the half-open connections; new ones work again."""
        self._partitioned = False

        def end_frozen(connection: _Connection) -> None:
            if not connection.flowing.is_set():
                connection.cut()

        self._call(self._each(end_frozen, None))

    async def _each(self, act: Callable[[_Connection], None], application: str | None) -> int:
        chosen = [connection for connection in self._connections if connection.is_of(application)]
        for connection in chosen:
            act(connection)
        return len(chosen)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(writer, to_server)
        if self._partitioned:
            connection.flowing.clear()
        self._connections.add(connection)
        pumps = (
            asyncio.ensure_future(self._pump(reader, to_server, connection, listening=True)),
            asyncio.ensure_future(self._pump(from_server, writer, connection, listening=False)),
        )
        self._pumps.update(pumps)
        await asyncio.gather(*pumps, return_exceptions=True)
        self._pumps.difference_update(pumps)
        self._connections.discard(connection)
        connection.cut()

    @staticmethod
    async def _pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection, *, listening: bool
    ) -> None:
        try:
            while data := await reader.read(65536):
                if listening and len(connection.startup) < _STARTUP_BYTES:
                    connection.startup += data
                await connection.flowing.wait()
                writer.write(data)
                await writer.drain()
            await connection.flowing.wait()
        except OSError:
            await connection.flowing.wait()  # not even the other side's end is passed on
        connection.cut()

    async def _close(self) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await self._each(_Connection.cut, None)
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def _call(self, work: Awaitable[T]) -> T:
        coroutine: Coroutine[Any, Any, T] = _awaited(work)
        future: Future[T] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(15)


async def _awaited(work: Awaitable[T]) -> T:
    return await work
