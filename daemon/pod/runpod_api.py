"""A client for RunPod's API v2: lists, reads, creates, stops and terminates pods.

Requests and responses follow docs.runpod.io/api-reference-v2; errors are RFC 9457 problem documents. Nothing here
retries: only the caller knows whether to look for a pod that may have been created, or to ask again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote

import httpx
import structlog

from daemon.errors import TrainerError
from daemon.network.endpoint_client import endpoint_client
from daemon.network.retry_after import is_page, is_transient, retry_after_seconds, said_by_page

log = structlog.get_logger()

API = "https://api.runpod.io/v2"
CALL_SECONDS = 20.0
# Thousands of pods. A list that is longer is an error, not a short list.
MAX_PAGES = 100

PodAction = Literal["stop", "terminate"]
# Statuses of pods that cost nothing now or in a moment (only the disk of a stopped one is billed).
STOPPED = frozenset({"EXITED", "STOPPED", "STOPPING"})
TERMINATED = frozenset({"TERMINATED", "TERMINATING"})

_NO_CAPACITY = ("no longer any instances", "not have the resources", "no instances", "capacity")


class ApiFault(StrEnum):
    """Why a call failed, grouped by what to do next."""

    REFUSED = "refused"  # 401, 402, 403: the key, its rights or the balance; a person must act
    NO_CAPACITY = "no_capacity"  # this GPU type is not available now; another may be
    ABSENT = "absent"  # 404: no such pod
    CONFLICT = "conflict"  # 409: not possible in the pod's state
    INVALID = "invalid"  # any other 4xx: the request is wrong; a person must act
    AWAY = "away"  # 429, 5xx, no answer: try later


class RunPodError(TrainerError):
    """A call failed. `certain` False: it may have been carried out."""

    def __init__(self, fault: ApiFault, detail: str, *, status: int | None = None, wait_seconds: float = 0.0) -> None:
        super().__init__(f"{detail} (HTTP {status})" if status else detail)
        self.fault = fault
        self.status = status
        self.wait_seconds = wait_seconds

    @property
    def certain(self) -> bool:
        return self.fault is not ApiFault.AWAY or self.status == httpx.codes.TOO_MANY_REQUESTS


@dataclass(frozen=True)
class Key:
    """An API key and where it came from. The name may be logged, the value never."""

    name: str
    value: str


@dataclass(frozen=True)
class Pod:
    """A pod as the API reports it. `cost_per_hour` is for the whole pod, in US dollars; None if not reported."""

    id: str
    name: str
    status: str
    cost_per_hour: float | None = None
    gpu_type: str | None = None
    gpu_count: int = 0

    @property
    def price_per_gpu_hour(self) -> float | None:
        return None if self.cost_per_hour is None else self.cost_per_hour / max(self.gpu_count, 1)


class RunPod:
    """The pods of one account, as a context manager. Tries the keys in order until one has the right."""

    def __init__(self, keys: Sequence[Key], *, api: str = API, call_seconds: float = CALL_SECONDS) -> None:
        self._keys = list(keys)
        self._api = api.rstrip("/")
        self._client = endpoint_client(self._api, timeout=call_seconds)

    async def __aenter__(self) -> RunPod:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def list_pods(self) -> list[Pod]:
        """Lists every pod of the account. Raises rather than return an incomplete list."""
        pods: list[Pod] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page = await self._call("GET", "/pods", params={"cursor": cursor} if cursor else None)
            listed = page.get("pods")
            if not isinstance(listed, list):
                raise RunPodError(ApiFault.AWAY, "the list of pods has an unknown format")
            pods.extend(_pod(item) for item in listed)
            pagination = page.get("pagination") or {}
            if not pagination.get("hasNextPage"):
                return pods
            cursor = pagination.get("nextCursor")
            if not cursor:
                break
        raise RunPodError(ApiFault.AWAY, "the list of pods does not end")

    async def read_pod(self, pod_id: str) -> Pod:
        return _pod(await self._call("GET", f"/pods/{quote(pod_id, safe='')}"))

    async def create_pod(self, body: Mapping[str, Any]) -> Pod:
        """Creates a pod. After an error that is not `certain` it may exist: look for its name before asking again."""
        return _pod(await self._call("POST", "/pods", body=body))

    async def end_pod(self, pod_id: str, action: PodAction) -> None:
        """Stops or terminates a pod. It is no error if the pod already is, or does not exist."""
        try:
            await self._call("POST", f"/pods/{quote(pod_id, safe='')}/action", body={"action": action})
        except RunPodError as error:
            if error.fault is ApiFault.ABSENT:
                return
            if error.fault is not ApiFault.CONFLICT or not await self._is_ended(pod_id, action):
                raise

    async def _is_ended(self, pod_id: str, action: PodAction) -> bool:
        try:
            status = (await self.read_pod(pod_id)).status
        except RunPodError as error:
            return error.fault is ApiFault.ABSENT
        return status in TERMINATED or (action == "stop" and status in STOPPED)

    async def _call(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, params: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        if not self._keys:
            raise RunPodError(ApiFault.REFUSED, "there is no API key: set TRAINER_RUNPOD_API_KEY")
        refused: RunPodError | None = None
        for key in list(self._keys):
            try:
                answer = await self._client.request(
                    method, self._api + path, json=body, params=params, headers={"Authorization": f"Bearer {key.value}"}
                )
            except httpx.HTTPError as error:
                raise RunPodError(ApiFault.AWAY, f"RunPod does not answer: {type(error).__name__}") from error
            if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                log.debug("runpod_key_refused", key=key.name, status=answer.status_code, path=path)
                refused = _error(answer)
                continue
            # From now on, try the key that worked first.
            self._keys.sort(key=lambda one: one is not key)
            return _content(answer)
        assert refused is not None
        raise refused


def _content(answer: httpx.Response) -> dict[str, Any]:
    if not answer.is_success:
        raise _error(answer)
    if not answer.content:
        return {}
    try:
        content = answer.json()
    except ValueError as error:
        raise RunPodError(ApiFault.AWAY, "the answer is not JSON", status=answer.status_code) from error
    if not isinstance(content, dict):
        raise RunPodError(ApiFault.AWAY, "the answer is not a JSON object", status=answer.status_code)
    return content


def _error(answer: httpx.Response) -> RunPodError:
    status, detail = answer.status_code, _detail(answer)
    return RunPodError(_fault(status, detail), detail, status=status, wait_seconds=retry_after_seconds(answer))


def _fault(status: int, detail: str) -> ApiFault:
    # Missing capacity has no status of its own (400, 409 or 500): only the text tells.
    if status in (400, 409, 500, 503) and any(words in detail.lower() for words in _NO_CAPACITY):
        return ApiFault.NO_CAPACITY
    match status:
        case 401 | 402 | 403:
            return ApiFault.REFUSED
        case 404:
            return ApiFault.ABSENT
        case 409:
            return ApiFault.CONFLICT
        case _ if 400 <= status < 500 and not is_transient(status):
            return ApiFault.INVALID
        case _:
            return ApiFault.AWAY


def _detail(answer: httpx.Response) -> str:
    """The text of the problem document, else the status."""
    if is_page(answer):
        return said_by_page(answer.status_code)
    try:
        problem = answer.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict):
        for field in ("detail", "title", "message", "error"):
            if isinstance(problem.get(field), str) and problem[field]:
                return str(problem[field])[:500]
    return answer.reason_phrase or "RunPod refused the request"


def _pod(content: Mapping[str, Any]) -> Pod:
    pod_id = content.get("id") if isinstance(content, Mapping) else None
    if not isinstance(pod_id, str) or not pod_id:
        raise RunPodError(ApiFault.AWAY, "a pod came without an id")
    gpu = content.get("gpu") or {}
    cost = content.get("cost")
    known = isinstance(cost, int | float) and not isinstance(cost, bool) and math.isfinite(cost) and cost >= 0
    return Pod(
        id=pod_id,
        name=str(content.get("name") or ""),
        status=str(content.get("status") or "").upper(),
        cost_per_hour=float(cost) if known and cost is not None else None,
        gpu_type=gpu.get("id"),
        gpu_count=int(gpu.get("count") or 0),
    )
