"""A real receiver of callbacks on loopback: keeps what it received, and answers as the test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.doubles.loopback import Cut, Exchange, LoopbackDouble


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def payload(self) -> dict[str, Any]:
        return dict(json.loads(self.body))


@dataclass(frozen=True)
class Answer:
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    hang: bool = False
    nonsense: bytes | None = None


class Receiver(LoopbackDouble):
    """`answers` are used one per request; the last one repeats. Enter it to serve."""

    def __init__(self, *answers: Answer) -> None:
        self.received: list[Received] = []
        self.answers = list(answers) or [Answer()]
        self.most_at_once = 0
        self._at_once = 0
        self._arrival = asyncio.Condition()
        self._release = asyncio.Event()
        super().__init__()

    @property
    def url(self) -> str:
        return f"{self.server.url}/callback?token=secret-of-the-url"

    def release(self) -> None:
        """Lets hanging requests be answered."""
        self._release.set()

    async def wait_for(self, enough: Callable[[list[Received]], bool], seconds: float = 10.0) -> list[Received]:
        async with self._arrival:
            async with asyncio.timeout(seconds):
                await self._arrival.wait_for(lambda: enough(self.received))
        return list(self.received)

    async def handle(self, exchange: Exchange) -> None:
        body = await exchange.body()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            async with self._arrival:
                self.received.append(Received(exchange.path, exchange.headers, body))
                self._arrival.notify_all()
            if answer.hang:
                await self._release.wait()
            if answer.nonsense is not None:
                exchange.writer.write(answer.nonsense)
                await exchange.writer.drain()
                exchange.writer.close()
                raise Cut("nothing more to say")
            await exchange.answer(answer.status, answer.body, answer.headers)
        finally:
            self._at_once -= 1
