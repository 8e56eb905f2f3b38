"""A stand-in for an OpenAI-compatible API: `POST /v1/chat/completions`, as OpenAI's API reference describes it.

It checks the key, the model and the shape of the request, answers in the documented shape, and refuses as the real one
does: 401 for a key that it does not know, 404 for a model, 429 with Retry-After for too many requests, 400 for a
parameter that the model does not support. `judge` decides on the two answers of a request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.doubles.loopback import Exchange, LoopbackDouble

KEY = "sk-the-key-of-this-test"
MODEL = "judge-1"
_PART = re.compile(
    r"^--- (?P<what>[\w ]+) (?P<mark>[0-9a-f]{8}) ---\n(?P<text>.*?)\n--- end of (?P=what) (?P=mark) ---$", re.M | re.S
)

# From the answers A and B, and everything else that was sent, to what the model says.
Judge = Callable[[str, str, str], str]


@dataclass
class Refusal:
    """Answered once, before the API works again."""

    status: int
    message: str
    headers: dict[str, str] = field(default_factory=dict)


def parts_of(text: str) -> dict[str, str]:
    """The parts of a request by name, as a reader sees them who looks at the marked lines."""
    return {found["what"]: found["text"] for found in _PART.finditer(text)}


class ChatCompletions(LoopbackDouble):
    def __init__(self, judge: Judge, *, refuses_temperature: bool = False) -> None:
        self.judge = judge
        self.refuses_temperature = refuses_temperature
        self.refusals: list[Refusal] = []
        self.requests: list[dict[str, Any]] = []
        self.raw: bytes | None = None
        super().__init__()

    @property
    def base(self) -> str:
        return f"{self.url}/v1"

    async def handle(self, exchange: Exchange) -> None:
        body = json.loads(await exchange.body())
        if exchange.method != "POST" or exchange.path != "/v1/chat/completions":
            return await self._refuse(exchange, Refusal(404, f"Unknown request URL: {exchange.method} {exchange.path}"))
        given = exchange.headers.get("authorization", "")
        if given != f"Bearer {KEY}":
            # It repeats the key, as OpenAI's does in part.
            return await self._refuse(exchange, Refusal(401, f"Incorrect API key provided: {given[7:]}."))
        if self.refusals:
            return await self._refuse(exchange, self.refusals.pop(0))
        assert set(body) <= {"model", "messages", "temperature"} and [m["role"] for m in body["messages"]] == [
            "system",
            "user",
        ]
        if body["model"] != MODEL:
            return await self._refuse(exchange, Refusal(404, f"The model `{body['model']}` does not exist."))
        if self.refuses_temperature and "temperature" in body:
            message = "Unsupported value: 'temperature' does not support 0 with this model."
            return await self._refuse(exchange, Refusal(400, message))
        self.requests.append(body)
        if self.raw is not None:
            return await exchange.answer(200, self.raw)
        system, user = (message["content"] for message in body["messages"])
        parts = parts_of(user)
        content = self.judge(parts["answer A"], parts["answer B"], system + user)
        answer = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
        return await exchange.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    async def _refuse(self, exchange: Exchange, refusal: Refusal) -> None:
        error = {"error": {"message": refusal.message, "type": "invalid_request_error", "param": None, "code": None}}
        headers = {"Content-Type": "application/json", **refusal.headers}
        await exchange.answer(refusal.status, json.dumps(error).encode(), headers)
