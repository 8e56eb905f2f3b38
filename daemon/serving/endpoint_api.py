"""What we ask of an endpoint: an OpenAI-compatible server, of which vLLM can also be told to load an adapter.

Seen with vLLM 0.32: an adapter whose rank is too large is answered 500; one with other modules than the server adapts,
or of another base model of the same shapes, is loaded without a word.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Self

import httpx

from daemon.errors import TrainerError
from daemon.network.endpoint_client import endpoint_client
from daemon.settings import Settings

# The first answer of a server that has just started takes it a minute: it compiles.
ANSWER_SECONDS = 180.0
LOAD_SECONDS = 300.0
CONNECT_SECONDS = 10.0
LIST_SECONDS = 20.0
MAX_ANSWER_BYTES = 4_000_000
ANSWER_TOKENS = 32
SHOWN_CHARACTERS = 300


class EndpointError(TrainerError):
    """The endpoint did not do what was asked. `status` is None if it did not answer at all."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message

    @property
    def may_pass(self) -> bool:
        return self.status is None or self.status in (408, 425, 429) or self.status >= 500


@dataclass(frozen=True)
class ServedModel:
    """A line of the endpoint's list: a base model, or an adapter with its `parent`. `root`: where it is loaded from."""

    id: str
    root: str | None = None
    parent: str | None = None


@dataclass(frozen=True)
class Answer:
    """The greedy answer to a prompt. `tokens` with their logarithmic probabilities, where the server tells them."""

    text: str
    tokens: tuple[tuple[str, float], ...] | None = None


class Endpoint(AbstractAsyncContextManager["Endpoint"]):
    """The endpoint of the settings; enter it to talk to it. Every method raises EndpointError."""

    def __init__(self, settings: Settings) -> None:
        assert settings.endpoint_url is not None
        # As people write it: with the version of the API, or without.
        self._base = settings.endpoint_url.rstrip("/").removesuffix("/v1")
        key = settings.endpoint_key
        self._headers = {} if key is None else {"Authorization": f"Bearer {key.get_secret_value()}"}
        self._secret = None if key is None else key.get_secret_value()
        self._client = endpoint_client(self._base, timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS))
        self._way = 0

    @property
    def name(self) -> str:
        """Host and port: the same for every host that uses this endpoint under this address."""
        return httpx.URL(self._base).netloc.decode("ascii")

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._client.__aexit__(*exc)

    async def models(self) -> list[ServedModel]:
        """Lists the base models and adapters that are served now."""
        answer = await self._ask("GET", "/v1/models", None, LIST_SECONDS)
        listed = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(listed, list):
            raise EndpointError(200, "its list of models cannot be read: it is not an OpenAI-compatible server")
        return [
            ServedModel(str(each["id"]), _text(each.get("root")), _text(each.get("parent")))
            for each in listed
            if isinstance(each, dict) and "id" in each
        ]

    async def load(self, name: str, path: str) -> None:
        """Tells vLLM of an adapter; one of this name is replaced."""
        asked = {"lora_name": name, "lora_path": path, "load_inplace": True}
        try:
            await self._ask("POST", "/v1/load_lora_adapter", asked, LOAD_SECONDS)
        except EndpointError as error:
            # Servers before load_inplace.
            if error.status != 400 or "already been loaded" not in error.message:
                raise
            await self.unload(name)
            await self._ask("POST", "/v1/load_lora_adapter", asked, LOAD_SECONDS)

    async def unload(self, name: str) -> bool:
        """Tells vLLM to forget an adapter. Returns False if it knows none of this name."""
        try:
            await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, LOAD_SECONDS)
        except EndpointError as error:
            if error.status in (400, 404) and "cannot be found" in error.message:
                return False
            raise
        return True

    async def answer(self, model: str, prompt: str, template_options: Mapping[str, Any]) -> Answer:
        """Asks a model a prompt, greedily. The first way that the endpoint takes is kept for the next ones.

        `template_options`: what the chat template is given, as in the adapter's training."""
        ways = _ways(model, prompt, template_options)
        while True:
            path, body = ways[self._way]
            try:
                return _read_answer(await self._ask("POST", path, body, ANSWER_SECONDS))
            except EndpointError as error:
                # A base model without a chat template, or a server that tells no probabilities.
                if error.status not in (400, 422, 501) or self._way + 1 == len(ways):
                    raise
                self._way += 1

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        try:
            async with (
                asyncio.timeout(seconds),
                self._client.stream(method, self._base + path, json=body, headers=self._headers) as response,
            ):
                text = bytearray()
                async for piece in response.aiter_bytes():
                    text += piece
                    if len(text) > MAX_ANSWER_BYTES:
                        raise EndpointError(response.status_code, "its answer is too long")
        except TimeoutError:
            raise EndpointError(None, f"it did not answer within {seconds:.0f} s") from None
        except httpx.HTTPError as error:
            raise EndpointError(None, f"it cannot be reached ({type(error).__name__})") from error
        except httpx.InvalidURL as error:
            raise EndpointError(None, "its address cannot be read") from error
        if response.status_code != 200:
            raise EndpointError(response.status_code, self._words_of(bytes(text), response.status_code))
        try:
            return json.loads(text)
        except ValueError:
            # What vLLM answers to a load: a sentence.
            return None

    def _words_of(self, text: bytes, status: int) -> str:
        """The server's own words, as far as they can be shown."""
        said: object = None
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if isinstance(answer, dict):
            error = answer.get("error", answer.get("detail", answer.get("message")))
            said = error.get("message") if isinstance(error, dict) else error
        words = " ".join(str(said).split()) if isinstance(said, str) and said.strip() else "no reason given"
        words = words.replace(self._secret, "…") if self._secret else words
        words = words if len(words) <= SHOWN_CHARACTERS else words[: SHOWN_CHARACTERS - 1] + "…"
        return f"it answered HTTP {status}: {words}"


def _ways(model: str, prompt: str, template_options: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The ways to ask, the best first: as a chat is trained, with probabilities; without; and without a template."""
    common = {"model": model, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    chat = {**common, "messages": [{"role": "user", "content": prompt}]}
    if template_options:
        chat["chat_template_kwargs"] = dict(template_options)
    plain = {**common, "prompt": prompt}
    return [
        ("/v1/chat/completions", {**chat, "logprobs": True}),
        ("/v1/chat/completions", chat),
        ("/v1/completions", {**plain, "logprobs": 1}),
        ("/v1/completions", plain),
    ]


def _read_answer(answer: Any) -> Answer:
    try:
        choice = answer["choices"][0]
        message = choice.get("message")
        if message is None:
            text = str(choice["text"])
        else:
            # A thinking model may have said nothing but thoughts yet; its servers name them in two ways.
            text = str(message.get("content") or message.get("reasoning") or message.get("reasoning_content") or "")
        return Answer(text, _tokens_of(choice.get("logprobs")))
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise EndpointError(200, "its answer cannot be read: it is not an OpenAI-compatible server") from error


def _tokens_of(logprobs: Any) -> tuple[tuple[str, float], ...] | None:
    if not isinstance(logprobs, dict):
        return None
    if isinstance(logprobs.get("content"), list):
        return tuple((str(each["token"]), float(each["logprob"])) for each in logprobs["content"]) or None
    tokens, values = logprobs.get("tokens"), logprobs.get("token_logprobs")
    if isinstance(tokens, list) and isinstance(values, list):
        return tuple((str(token), float(value)) for token, value in zip(tokens, values, strict=False)) or None
    return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
