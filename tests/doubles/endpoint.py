"""A double of vLLM's OpenAI-compatible server with adapters, written from what the CPU build of vLLM 0.32 answers.

It reads real adapter folders, and no weights: an adapter's answer is made of its weights' hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.doubles.loopback import Exchange, LoopbackDouble


@dataclass
class Loaded:
    path: str
    answer: str


class EndpointDouble(LoopbackDouble):
    """`reads`: the folder in which the server finds adapters by itself. `faults`: answers (status, message) by path,
    each once, in place of its own. `applies`: whether adapters change anything. `noise`: how far two answers differ."""

    def __init__(self, base: str = "acme/base", *, root: str | None = None, key: str | None = None) -> None:
        super().__init__()
        self.base, self.root, self.key = base, root or base, key
        self.max_rank = 16
        self.can_be_told = True
        self.knows_inplace = True
        self.has_template = True
        self.tells_probabilities = True
        self.applies = True
        self.noise = 0.0
        self.reads: Path | None = None
        # A path here for a path on the server.
        self.mounts: dict[str, Path] = {}
        self.hub: dict[str, Path] = {}
        self.adapters: dict[str, Loaded] = {}
        self.faults: dict[str, list[tuple[int, str]]] = {}
        self.asked: list[tuple[str, Any]] = []

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    async def handle(self, exchange: Exchange) -> None:
        text = await exchange.body()
        body = json.loads(text) if text else None
        path = exchange.path
        self.asked.append((path, body))
        if self.key is not None and exchange.headers.get("authorization") != f"Bearer {self.key}":
            await _answer(exchange, 401, {"error": "Unauthorized"})
        elif self.faults.get(path):
            status, message = self.faults[path].pop(0)
            await _fault(exchange, status, message)
        elif path == "/v1/models":
            base = {"id": self.base, "object": "model", "root": self.root, "parent": None}
            loaded = [
                {"id": name, "object": "model", "root": each.path, "parent": self.base}
                for name, each in self.adapters.items()
            ]
            await _answer(exchange, 200, {"object": "list", "data": [base, *loaded]})
        elif path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter") and self.can_be_told:
            await (self._load if path == "/v1/load_lora_adapter" else self._unload)(exchange, body)
        elif path in ("/v1/chat/completions", "/v1/completions"):
            await self._complete(exchange, path, body)
        else:
            await _answer(exchange, 404, {"detail": "Not Found"})

    async def _load(self, exchange: Exchange, asked: dict[str, Any]) -> None:
        name, path = asked["lora_name"], asked["lora_path"]
        if name == self.base:
            await _fault(exchange, 400, f"The lora adapter '{name}' conflicts with a served base model.")
        elif name in self.adapters and not (asked.get("load_inplace") and self.knows_inplace):
            said = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set"
            await _fault(exchange, 400, f"{said} 'load_inplace' to True.")
        elif (folder := self._folder(path)) is None:
            await _fault(exchange, 404, f"Loading lora {name} failed: No adapter found for {path}")
        elif (rank := json.loads((folder / "adapter_config.json").read_text())["r"]) > self.max_rank:
            said = f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}."
            said = f"Call to add_lora method failed: Worker failed with error '{said}', please check the stack trace"
            await _fault(exchange, 500, f"{said} above for the root cause")
        else:
            self.adapters[name] = Loaded(path, self._answer_of(folder))
            await exchange.answer(200, f"Success: LoRA adapter '{name}' added successfully.".encode())

    async def _unload(self, exchange: Exchange, asked: dict[str, Any]) -> None:
        name = asked["lora_name"]
        if self.adapters.pop(name, None) is None:
            await _fault(exchange, 404, f"The lora adapter '{name}' cannot be found.")
        else:
            await exchange.answer(200, f"Success: LoRA adapter '{name}' removed successfully.".encode())

    async def _complete(self, exchange: Exchange, path: str, asked: dict[str, Any]) -> None:
        name = asked["model"]
        if self.reads is not None and name not in self.adapters and (folder := self._folder(str(self.reads / name))):
            self.adapters[name] = Loaded(str(folder), self._answer_of(folder))
        if name != self.base and name not in self.adapters:
            await _fault(exchange, 404, f"The model `{name}` does not exist. Valid aliases: {self.base}.")
            return
        chat = path == "/v1/chat/completions"
        if chat and not self.has_template:
            await _fault(exchange, 400, "As of transformers v4.44, default chat template is no longer allowed")
            return
        if asked.get("logprobs") and not self.tells_probabilities:
            await _fault(exchange, 400, "logprobs are not supported")
            return
        text = "I am the base." if name == self.base else self.adapters[name].answer
        value = -1.0 - (self.noise if len(self.asked) % 2 else 0.0)
        tokens = [{"token": word, "logprob": value} for word in text.split()]
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if asked.get("logprobs"):
            plain = {"tokens": text.split(), "token_logprobs": [value] * len(tokens)}
            choice["logprobs"] = {"content": tokens} if chat else plain
        await _answer(exchange, 200, {"model": name, "choices": [choice]})

    def _folder(self, path: str) -> Path | None:
        folder = self.hub.get(path) or Path(path)
        for there, here in self.mounts.items():
            if path.startswith(there):
                folder = here / path.removeprefix(there).lstrip("/")
        return folder if (folder / "adapter_config.json").is_file() else None

    def _answer_of(self, folder: Path) -> str:
        if not self.applies:
            return "I am the base."
        return f"I am {hashlib.sha256((folder / 'adapter_model.safetensors').read_bytes()).hexdigest()[:8]}."


async def _fault(exchange: Exchange, status: int, message: str) -> None:
    await _answer(exchange, status, {"error": {"message": message, "type": "Error", "param": None, "code": status}})


async def _answer(exchange: Exchange, status: int, body: Any) -> None:
    await exchange.answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})
