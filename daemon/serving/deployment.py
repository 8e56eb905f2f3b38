"""Serves one finished adapter at the endpoint: puts it where that finds it, tells it, and asks until it answers.

It is served under its job's id. A name that the job asks for comes after the proof, so that whoever uses the name never
meets an adapter that does not answer; and what the name meant before is unloaded last.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import structlog

from daemon.errors import JobDelayed, JobFailed, disk_fault
from daemon.serving.difference import differs
from daemon.serving.endpoint_api import Answer, Endpoint, EndpointError
from daemon.serving.fit import misfits_by_settings, not_served, served_base
from daemon.settings import Settings
from training.events import ErrorCode
from training.files.durable_files import beside, put_in_place
from training.files.vllm_ranks import smallest_max_lora_rank

log = structlog.get_logger()

# Of a job whose prompts all happen to be answered alike; one that differs is enough.
MOST_PROMPTS = 4
DEFAULT_PROMPT = "What can you help me with?"
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 15.0
SHOWN_CHARACTERS = 500
# In the shared folder, beside the adapter's own files: the hash of the adapter that lies there whole.
COMPLETE = ".brightrun-complete"

T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """Whether a name means this adapter now. `superseded`: the same owner's jobs whose adapters it meant before."""

    is_taken: bool
    superseded: tuple[UUID, ...] = ()
    why_not: str | None = None


@dataclass(frozen=True)
class Order:
    """Which adapter, and how it is proven. `repository`: where the endpoint finds it on the hub, if not in the folder.
    `take_name` (endpoint, name, whether that is in use there) makes the name mean this job in the database, where no
    two owners can have the same."""

    job_id: UUID
    base_model: str
    rank: int
    modules: tuple[str, ...]
    prompts: tuple[str, ...]
    adapter_sha256: str = ""
    repository: str | None = None
    name: str | None = None
    take_name: Callable[[str, str, bool], Awaitable[Taken]] | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)


async def deploy(order: Order, adapter: Path | None, settings: Settings) -> dict[str, Any]:
    """Returns the name that the adapter answers to, and an answer. Done twice, it leaves the same as done once.

    `adapter`: its folder, needed if the endpoint takes adapters from a folder. Raises JobFailed for what only the
    operator or another job can mend, JobDelayed for what may pass."""
    async with Endpoint(settings) as endpoint:
        return await _Visit(endpoint, order, settings).deploy(adapter)


class _Visit:
    """One deployment at the endpoint. It is given up, to be tried again, after TRAINER_ENDPOINT_SECONDS."""

    def __init__(self, endpoint: Endpoint, order: Order, settings: Settings) -> None:
        self._endpoint = endpoint
        self._order = order
        self._settings = settings
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()

    async def deploy(self, adapter: Path | None) -> dict[str, Any]:
        order, settings = self._order, self._settings
        base = await self._fitting_base()
        path = await self._place(adapter)
        is_told = settings.endpoint_loads == "told"
        # By itself, a server finds an adapter on the hub by the repository's name.
        model = str(order.job_id) if is_told or settings.endpoint_dir is not None else path
        if is_told:
            await self._load(model, path)
        prompt, answer = await self._prove(base, model)
        result: dict[str, Any] = {"model": model}
        if order.template_options:
            # A request that leaves them out is answered after a prompt that the adapter was not trained on.
            result["chat_template_kwargs"] = dict(order.template_options)
        if order.name is not None:
            result |= await self._give_name(order.name, model, path)
        return result | {
            "base_model": order.base_model,
            "prompt": prompt[:SHOWN_CHARACTERS],
            "answer": answer[:SHOWN_CHARACTERS],
            "seconds": round(self._clock() - self._began, 1),
        }

    async def _fitting_base(self) -> str:
        """Returns what the endpoint calls the adapter's base model."""
        order, settings = self._order, self._settings
        served = await self._tried(self._endpoint.models)
        base = served_base(settings, served, order.base_model)
        faults = [*misfits_by_settings(settings, order.rank, order.modules)]
        if base is not None and not faults:
            return base.id
        faults = faults if base is not None else [not_served(served, order.base_model), *faults]
        raise _failed(f"The adapter does not fit the endpoint: {'; '.join(faults)}")

    async def _place(self, adapter: Path | None) -> str:
        """Puts the adapter into the shared folder. Returns its path as the endpoint sees it, or its repository."""
        order, settings = self._order, self._settings
        if settings.endpoint_dir is None:
            if order.repository is None:
                raise _failed("The endpoint takes adapters from the hub, and this one is not there", "Set push_to_hub.")
            return order.repository
        assert adapter is not None
        folder = settings.endpoint_dir / str(order.job_id)
        path = f"{(settings.endpoint_sees or str(settings.endpoint_dir)).rstrip('/')}/{order.job_id}"
        try:
            if not await asyncio.to_thread(_holds, folder, order.adapter_sha256):
                if settings.endpoint_loads == "told":
                    await self._unload_from(path)
                await asyncio.to_thread(_copy, adapter, folder, order.adapter_sha256)
        except OSError as error:
            raise disk_fault("storage folder", settings.endpoint_dir, error) from error
        return path

    async def _unload_from(self, path: str) -> None:
        """Before another adapter of the job lies there (the database came from a backup): what is loaded is the old
        one, and would pass for the new one."""
        for model in await self._tried(self._endpoint.models):
            if model.root == path:
                await self._tried(partial(self._endpoint.unload, model.id))

    async def _load(self, name: str, path: str) -> None:
        """Tells vLLM of the adapter, unless it is loaded from that folder already. What a repository holds changes."""
        if self._settings.endpoint_dir is not None:
            served = await self._tried(self._endpoint.models)
            if any(model.id == name and model.root == path for model in served):
                return
        try:
            await self._tried(lambda: self._endpoint.load(name, path), _load_may_pass)
        except JobFailed as failed:
            cause = failed.__cause__
            assert isinstance(cause, EndpointError)
            hint = _hint_to_load(cause, self._order.rank)
            raise _failed(f"The endpoint did not load the adapter: {cause.message}", hint) from cause

    async def _prove(self, base: str, model: str) -> tuple[str, str]:
        """Asks base and adapter the same until their answers differ. Returns the prompt and the adapter's answer."""
        for prompt in (self._order.prompts or (DEFAULT_PROMPT,))[:MOST_PROMPTS]:
            # The base first: by the way that it answers, the adapter is asked as well.
            first = await self._ask(base, prompt)
            again = await self._ask(base, prompt)
            found = await self._ask(model, prompt)
            if differs(first, again, found):
                return prompt, found.text
        raise _failed(
            f"The endpoint answers as {model} exactly what its base model answers: it does not apply the adapter",
            "Look at the endpoint's own log. An adapter that was hardly trained may answer like its base as well.",
        )

    async def _ask(self, model: str, prompt: str) -> Answer:
        # A server that finds adapters by itself knows this one a moment later.
        return await self._tried(
            lambda: self._endpoint.answer(model, prompt, self._order.template_options),
            lambda error: error.may_pass or error.status == 404,
        )

    async def _give_name(self, name: str, model: str, path: str) -> dict[str, Any]:
        """Makes the name that the job asks for mean its adapter, and unloads what it meant before."""
        order = self._order
        if self._settings.endpoint_loads == "itself":
            return {"name_refused": f"The endpoint finds adapters by itself, as {model}, and gives them no other name."}
        assert order.take_name is not None
        served = await self._tried(self._endpoint.models)
        # Whatever the operator serves under this name is not replaced.
        in_use = any(model.id == name and model.root != path for model in served)
        taken = await order.take_name(self._endpoint.name, name, in_use)
        if not taken.is_taken:
            return {"name_refused": taken.why_not}
        await self._load(name, path)
        await self._ask(name, next(iter(order.prompts), DEFAULT_PROMPT))
        for job_id in taken.superseded:
            await self._forget(job_id)
        return {"model": name, "also": model, "superseded": [str(job_id) for job_id in taken.superseded]}

    async def _forget(self, job_id: UUID) -> None:
        """Unloads an adapter that nobody is led to any more. What stays of it costs memory, and fails nothing."""
        try:
            await self._endpoint.unload(str(job_id))
        except EndpointError as error:
            log.warning("superseded_adapter_not_unloaded", superseded=str(job_id), error=error.message)
            return
        if self._settings.endpoint_dir is not None:
            folder = self._settings.endpoint_dir / str(job_id)
            with contextlib.suppress(OSError):
                await asyncio.to_thread(_remove, folder)

    async def _tried(
        self,
        ask: Callable[[], Awaitable[T]],
        may_pass: Callable[[EndpointError], bool] = lambda error: error.may_pass,
    ) -> T:
        """Asks until there is an answer, or until it is time to give up.

        Raises JobDelayed then, and JobFailed if it is refused."""
        wait, give_up_at = FIRST_WAIT_SECONDS, self._began + self._settings.endpoint_seconds
        while True:
            try:
                return await ask()
            except EndpointError as error:
                is_late = self._clock() + wait >= give_up_at
                if not may_pass(error) or (is_late and not error.may_pass):
                    raise _refused(error) from error
                if is_late:
                    raise JobDelayed(
                        ErrorCode.ENDPOINT_FAILED,
                        f"The endpoint cannot serve the adapter now: {error.message}.",
                        "The adapter itself is stored and complete. It is tried again.",
                    ) from error
                log.info("endpoint_not_ready", error=error.message)
            await asyncio.sleep(wait)
            wait = min(2.0 * wait, LONGEST_WAIT_SECONDS)


def _holds(folder: Path, adapter_sha256: str) -> bool:
    try:
        return (folder / COMPLETE).read_text(encoding="utf-8") == adapter_sha256
    except FileNotFoundError:
        return False


def _remove(folder: Path) -> None:
    # First: what is half removed must not pass for whole. A folder without it is none of ours.
    (folder / COMPLETE).unlink()
    shutil.rmtree(folder)


def _copy(adapter: Path, folder: Path, adapter_sha256: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with beside(folder) as hidden:
        shutil.copytree(adapter, hidden, copy_function=shutil.copyfile)
        (hidden / COMPLETE).write_text(adapter_sha256, encoding="utf-8")
        # The endpoint runs as another user.
        for path in (hidden, *hidden.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        put_in_place(hidden, folder)


def _load_may_pass(error: EndpointError) -> bool:
    # vLLM answers 500 to an adapter that it will never take. A shared folder may show a new file late.
    refused = error.status == 500 and "add_lora" in error.message
    return (error.may_pass and not refused) or "No adapter found" in error.message


def _hint_to_load(error: EndpointError, rank: int) -> str | None:
    if "max_lora_rank" in error.message:
        needed = smallest_max_lora_rank(rank)
        return (
            f"Start vLLM with --max-lora-rank {needed} and set TRAINER_ENDPOINT_MAX_RANK to it, or train with a lower "
            "lora_rank."
        )
    if "No adapter found" in error.message:
        return (
            "The endpoint does not see the adapter: TRAINER_ENDPOINT_SEES must be the path of the shared folder on its "
            "machine; for the hub it needs a token of its own."
        )
    if error.status in (404, 405):
        return (
            "Start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=true, or set "
            "TRAINER_ENDPOINT_LOADS=itself."
        )
    return None


def _refused(error: EndpointError) -> JobFailed:
    hint = None
    if error.status in (401, 403):
        hint = "TRAINER_ENDPOINT_KEY must be the key that the endpoint was started with."
    return _failed(f"The endpoint does not answer with the adapter: {error.message}", hint)


def _failed(message: str, hint: str | None = None) -> JobFailed:
    more = "The adapter itself is stored and complete. Once this is mended, ask for the delivery again: redeliver()."
    return JobFailed(ErrorCode.ENDPOINT_FAILED, f"{message}.", hint or more)


def read_adapter(folder: Path) -> tuple[int, tuple[str, ...]]:
    """Returns the rank and the adapted modules that the adapter's config names. Raises OSError, ValueError."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    named = [*(config.get("target_modules") or ()), *(config.get("target_parameters") or ())]
    ranks = [int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())]
    return max(ranks), tuple(str(name).removesuffix(".weight") for name in named)
