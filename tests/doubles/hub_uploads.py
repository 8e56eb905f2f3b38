"""A double of the hub's side of an upload, written from its client's documentation and Git LFS's batch API.

Repositories, commits, and the object store beside the hub: a server of its own, to which no token may ever be sent.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from tests.doubles.loopback import Exchange, LoopbackDouble, LoopbackServer

# As in each new repository's .gitattributes: these are large files whatever their size.
LARGE = (".safetensors", ".png", ".bin")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def commit(self, message: str) -> str:
        state = json.dumps([message, len(self.commits), sorted((name, len(text)) for name, text in self.files.items())])
        self.commits.append(hashlib.sha1(state.encode()).hexdigest())
        self.messages.append(message)
        return self.commits[-1]


@dataclass(frozen=True)
class Fault:
    """What a step answers in place of its own answer."""

    status: int
    message: str = ""
    code: str | None = None


class HubUploads(LoopbackDouble):
    """`tokens`: the namespaces that each may write to. `faults`: by step (info, create, preupload, batch, put, verify,
    commit), each as often as it is in the list."""

    def __init__(self, tokens: dict[str, tuple[str, ...]], *, part_bytes: int | None = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.part_bytes = part_bytes
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.steps: list[str] = []
        self.objects: dict[str, bytes] = {}
        self._parts: dict[tuple[str, int], bytes] = {}
        self.store = LoopbackServer(self._store)
        # Whatever came with a token to a place that is not the hub.
        self.leaked: list[str] = []

    async def __aenter__(self) -> HubUploads:
        await self.store.__aenter__()
        await super().__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await super().__aexit__(*exc)
        await self.store.__aexit__(*exc)

    def add(self, name: str, *, private: bool = True, **files: bytes) -> Repository:
        repository = self.repositories[name] = Repository(private)
        repository.files |= files
        repository.commit("initial commit")
        return repository

    async def handle(self, exchange: Exchange) -> None:
        body = await exchange.body()
        token = exchange.headers.get("authorization", "").removeprefix("Bearer ")
        path = exchange.path
        if path == "/api/complete_multipart" and exchange.query.get("signature") == "secret":
            # Signed, and called without the token.
            await self._complete(exchange, json.loads(body))
        elif token not in self.tokens:
            headers = {"X-Error-Message": "Invalid credentials in Authorization header"}
            await _answer(exchange, 401, {"error": "Invalid credentials"}, headers)
        elif path == "/api/validate-yaml":
            await _answer(exchange, 200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            await self._create(exchange, json.loads(body), token)
        else:
            await self._of_repository(exchange, path, body, token)

    async def _create(self, exchange: Exchange, asked: dict[str, Any], token: str) -> None:
        if await self._faulty(exchange, "create"):
            return
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.tokens[token]:
            await _answer(exchange, 403, {"error": f"You don't have the rights to create a model under {name}"})
        elif name in self.repositories:
            await _answer(exchange, 409, {"error": "You already created this model repo"})
        else:
            self.add(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
            await _answer(exchange, 200, {"url": f"{self.url}/{name}", "name": name})

    async def _of_repository(self, exchange: Exchange, path: str, body: bytes, token: str) -> None:
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = f"{parts[0]}/{parts[1].removesuffix('.git')}", parts[2:]
        repository = self.repositories.get(name)
        writes = parts[0] in self.tokens[token]
        if repository is None or (repository.private and not writes):
            await _answer(exchange, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["resolve"]:
            await self._file(exchange, repository, "/".join(rest[2:]))
        elif path.startswith("/api/") and (not rest or rest[0] == "revision"):
            await self._info(exchange, name, repository)
        elif not writes:
            await _answer(exchange, 403, {"error": "Forbidden: you must have write access"})
        elif rest[:1] == ["preupload"]:
            await self._preupload(exchange, repository, json.loads(body))
        elif rest[:1] == ["info"]:
            await self._batch(exchange, json.loads(body))
        elif rest[:1] == ["verify"]:
            await self._verify(exchange, json.loads(body))
        elif rest[:1] == ["commit"]:
            await self._commit(exchange, name, repository, body)
        else:
            await _answer(exchange, 404, {"error": "no such route"})

    async def _info(self, exchange: Exchange, name: str, repository: Repository) -> None:
        if await self._faulty(exchange, "info"):
            return
        siblings = [{"rfilename": file} for file in sorted(repository.files)]
        facts = {"id": name, "modelId": name, "sha": repository.commits[-1], "private": repository.private}
        await _answer(exchange, 200, facts | {"siblings": siblings})

    async def _file(self, exchange: Exchange, repository: Repository, file: str) -> None:
        content = repository.files.get(file)
        if content is None:
            await _answer(exchange, 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        await exchange.answer(200, content, {"ETag": tag, "X-Repo-Commit": repository.commits[-1]})

    async def _preupload(self, exchange: Exchange, repository: Repository, asked: dict[str, Any]) -> None:
        if await self._faulty(exchange, "preupload"):
            return
        files = []
        for file in asked["files"]:
            large = file["path"].endswith(LARGE)
            content = repository.files.get(file["path"])
            oid = None if content is None else hashlib.sha256(content).hexdigest() if large else _git_oid(content)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        await _answer(exchange, 200, {"files": files})

    async def _batch(self, exchange: Exchange, asked: dict[str, Any]) -> None:
        if await self._faulty(exchange, "batch"):
            return
        repository = "/".join(exchange.path.split("/")[1:3]).removesuffix(".git")
        objects = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            actions = {"upload": self._upload_action(oid, size), "verify": {"href": f"{self.url}/{repository}/verify"}}
            objects.append({"oid": oid, "size": size} | ({} if oid in self.objects else {"actions": actions}))
        transfer = "multipart" if self.part_bytes else "basic"
        await _answer(exchange, 200, {"transfer": transfer, "objects": objects})

    def _upload_action(self, oid: str, size: int) -> dict[str, Any]:
        if self.part_bytes is None:
            return {"href": f"{self.store.url}/{oid}?signature=secret"}
        count = -(-size // self.part_bytes)
        urls = {f"{number:05}": f"{self.store.url}/{oid}/{number}?signature=secret" for number in range(1, count + 1)}
        return {
            "href": f"{self.url}/api/complete_multipart?signature=secret",
            "header": {"chunk_size": str(self.part_bytes), **urls},
        }

    async def _store(self, exchange: Exchange) -> None:
        if "authorization" in exchange.headers or "cookie" in exchange.headers:
            self.leaked.append(exchange.path)
        body = await exchange.body()
        if await self._faulty(exchange, "put"):
            return
        oid, _, part = exchange.path.strip("/").partition("/")
        if part:
            self._parts[oid, int(part)] = body
        elif hashlib.sha256(body).hexdigest() == oid:
            self.objects[oid] = body
        await exchange.answer(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    async def _complete(self, exchange: Exchange, asked: dict[str, Any]) -> None:
        oid = asked["oid"]
        whole = b"".join(self._parts[oid, part["partNumber"]] for part in asked["parts"])
        if hashlib.sha256(whole).hexdigest() == oid:
            self.objects[oid] = whole
        await _answer(exchange, 200, {})

    async def _verify(self, exchange: Exchange, asked: dict[str, Any]) -> None:
        if await self._faulty(exchange, "verify"):
            return
        whole = len(self.objects.get(asked["oid"], b"")) == asked["size"]
        await _answer(exchange, 200 if whole else 404, {} if whole else {"error": "Object does not exist"})

    async def _commit(self, exchange: Exchange, name: str, repository: Repository, body: bytes) -> None:
        if await self._faulty(exchange, "commit"):
            return
        header, *lines = (json.loads(line) for line in body.splitlines())
        if header["value"].get("parentCommit", repository.commits[-1]) != repository.commits[-1]:
            await _answer(exchange, 412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        oid = repository.commit(header["value"]["summary"])
        await _answer(
            exchange, 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}
        )

    async def _faulty(self, exchange: Exchange, step: str) -> bool:
        self.steps.append(step)
        if not self.faults.get(step):
            return False
        fault = self.faults[step].pop(0)
        headers = {"X-Error-Code": fault.code} if fault.code else {}
        await _answer(exchange, fault.status, {"error": fault.message}, headers)
        await asyncio.sleep(0)
        return True


async def _answer(exchange: Exchange, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    await exchange.answer(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
