"""A small double of the Hugging Face hub on loopback: one repository, its files, and some faults."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tests.doubles.loopback import Cut, Exchange, LoopbackDouble

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubDouble(LoopbackDouble):
    """Serves the files of `folder` as the repository `model`; everything else is absent."""

    def __init__(self, model: str, folder: Path, token: str | None = None) -> None:
        self.model, self.folder, self.token = model, folder, token
        self.cut_after: dict[str, int] = {}
        # Bytes that are sent in place of a file's own.
        self.sent_instead: dict[str, bytes] = {}
        self.status: int | None = None
        self.error_code: str | None = None
        self.served: list[str] = []
        self.bytes_sent = 0
        super().__init__()

    async def handle(self, exchange: Exchange) -> None:
        self.served.append(f"{exchange.method} {exchange.path}")
        if self.status is not None:
            await self._refuse(exchange, self.status, self.error_code)
        elif self.token is not None and exchange.headers.get("authorization") != f"Bearer {self.token}":
            await self._refuse(exchange, 401, "RepoNotFound")
        elif exchange.path.startswith(f"/api/models/{self.model}"):
            await self._info(exchange)
        elif exchange.path.startswith(f"/{self.model}/resolve/{COMMIT}/"):
            await self._file(exchange, exchange.path.rpartition("/")[2])
        else:
            await self._refuse(exchange, 404, "RepoNotFound")

    async def _refuse(self, exchange: Exchange, status: int, code: str | None) -> None:
        await exchange.answer(status, b'{"error": "no"}', {"X-Error-Code": code} if code else {})

    async def _info(self, exchange: Exchange) -> None:
        path = exchange.path
        files = [_facts_of(file) for file in sorted(self.folder.iterdir())]
        if "/tree/" in path:
            answer: object = files
        else:
            answer = {"id": self.model, "modelId": self.model, "sha": COMMIT, "private": False, "siblings": files}
        await exchange.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    async def _file(self, exchange: Exchange, name: str) -> None:
        file = self.folder / name
        if not file.is_file():
            await self._refuse(exchange, 404, "EntryNotFound")
            return
        content = self.sent_instead.get(name, file.read_bytes())
        asked = exchange.headers.get("range", "")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked.startswith("bytes=") else 0
        headers = {
            "ETag": f'"{_sha(file)}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content) - start),
            "Accept-Ranges": "bytes",
        }  # fmt: skip
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        exchange.start_answer(206 if start else 200, headers)
        if exchange.method == "HEAD":
            await exchange.writer.drain()
            return
        stop = self.cut_after.get(name)
        body = content[start:] if stop is None else content[start : start + stop]
        self.bytes_sent += len(body)
        exchange.writer.write(body)
        await exchange.writer.drain()
        if stop is not None:
            exchange.writer.close()
            raise Cut("as the test wants it")


def _facts_of(file: Path) -> dict[str, object]:
    size, sha256 = file.stat().st_size, _sha(file)
    facts: dict[str, object] = {"type": "file", "path": file.name, "rfilename": file.name, "size": size}
    if file.suffix == ".safetensors":
        facts["lfs"] = {"sha256": sha256, "oid": sha256, "size": size, "pointerSize": 134}
    return {**facts, "oid": sha256[:40]}


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
