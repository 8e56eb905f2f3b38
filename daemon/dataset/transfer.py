"""Downloads a job's dataset, wherever its row points to, into a local file.

It is streamed to disk under a size limit, resumed with Range after an interruption, and checked before use. The URL
of a stored dataset is signed when it is needed and again when it has expired: a job may wait for days.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Protocol

import httpx
import structlog
import tenacity

from daemon.dataset.object_version import ObjectVersion, version_of
from daemon.errors import JobDelayed, JobFailed, StorageAway, TrainerError, disk_fault
from daemon.network.address_rules import AddressRefused, AddressRules, AddressUnknown
from daemon.network.pinned_client import Target, guarded_client
from daemon.network.retry_after import is_transient, retry_after_seconds
from training.events import ErrorCode

log = structlog.get_logger()


TIMEOUT = httpx.Timeout(30.0, connect=10.0)
# A very slow server must not hold a GPU's slot: 2 GiB in half an hour is 1.2 MB/s.
MAX_SECONDS = 1800.0
MAX_REDIRECTS = 5
# Tries without a new byte before giving up; each new byte resets the count.
FRUITLESS_TRIES = 5
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
COPY_BYTES = 1024 * 1024

# Storage's own status in the body of an HTTP 400.
_IS_RANGE_REFUSED = re.compile(rb'"statusCode"\s*:\s*"?416\b')
_SUBMIT_AGAIN = "check the dataset URL and submit again"
_NOT_THE_JOB = "nothing is wrong with the job; the operator must check the storage, its keys and its clock"


@dataclass(frozen=True)
class FetchedDataset:
    """A dataset on local disk. `source` may be shown to users: bucket and path, or a URL without its query.

    `validator` is the server's strong ETag: equal ones mean equal bytes. None if the server sent none."""

    path: Path
    bytes: int
    sha256: str
    source: str
    validator: str | None = None


class _TransferBroken(TrainerError):
    """The transfer stopped and can be resumed. `after_seconds` is the wait that the server asked for."""

    def __init__(self, message: str, after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.after_seconds = after_seconds


class _Rejected(TrainerError):
    """The server refuses this URL: expired, or never allowed, or of a file that is gone. A freshly signed one may work,
    and whoever signs knows of a file that is gone. `of_given` is what it means for a URL that the user has given."""

    def __init__(self, of_given: JobFailed, reason: str) -> None:
        super().__init__(reason)
        self.of_given = of_given


class _Digest(Protocol):
    """A running hash. The type of hashlib's own objects has no public name."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass
class _Transfer:
    """What is on disk so far, and which version of the object it is part of.

    `known` is the validator of an earlier copy; `unchanged` is True when the server confirms that copy."""

    file: BinaryIO
    max_bytes: int
    source: str
    known: str | None = None
    unchanged: bool = False
    received: int = 0
    digest: _Digest = field(default_factory=hashlib.sha256)
    version: ObjectVersion | None = None
    fruitless: int = 0
    counted: int = 0

    def restart(self) -> None:
        self.file.seek(0)
        self.file.truncate()
        self.received = 0
        self.digest = hashlib.sha256()
        self.version = None

    def write(self, piece: bytes) -> None:
        self.file.write(piece)
        self.digest.update(piece)
        self.received += len(piece)

    def count_failure(self) -> int:
        """Returns the number of tries in a row that brought nothing new."""
        self.fruitless = 1 if self.received > self.counted else self.fruitless + 1
        self.counted = max(self.counted, self.received)
        return self.fruitless


async def download(
    sign: Callable[[], Awaitable[str]],
    to: Path,
    *,
    rules: AddressRules,
    max_bytes: int,
    source: str,
    is_stored: bool = False,
    known: FetchedDataset | None = None,
    first_wait_seconds: float = FIRST_WAIT_SECONDS,
) -> FetchedDataset:
    """Streams the URL that `sign` returns into `to`; see fetch_dataset for what is raised.

    `is_stored`: it lies in the project's storage. `sign` returns a new URL each time, which is worth a try when the
    first was refused, and what the storage fails to do is no fault of the job.
    """
    part = to.with_name(to.name + ".part")
    deadline = time.monotonic() + MAX_SECONDS

    def pause(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.after_seconds if isinstance(error, _TransferBroken) else 0.0
        backoff = first_wait_seconds * 2.0 ** (transfer.fruitless - 1)
        return min(max(backoff, asked), LONGEST_WAIT_SECONDS)

    def enough(_state: tenacity.RetryCallState) -> bool:
        return transfer.count_failure() >= FRUITLESS_TRIES or time.monotonic() > deadline

    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        part.touch(mode=0o600)
        with part.open("wb") as file:
            transfer = _Transfer(file, max_bytes, source, known.validator if known is not None else None)
            async with asyncio.timeout(MAX_SECONDS), guarded_client(TIMEOUT) as client:
                url, renewed_at = await sign(), -1
                async for attempt in tenacity.AsyncRetrying(
                    retry=tenacity.retry_if_exception_type(_TransferBroken), stop=enough, wait=pause, reraise=True
                ):
                    with attempt:
                        try:
                            await _continue(client, rules, url, transfer)
                        except _Rejected as error:
                            if not is_stored:
                                raise error.of_given from error
                            if renewed_at == transfer.received:
                                # Our own signature, a moment old: nothing that the job's owner could correct.
                                raise _not_now(source, str(error), is_stored) from error
                            url, renewed_at = await sign(), transfer.received
                            raise _TransferBroken(str(error)) from error
            await asyncio.to_thread(file.flush)
        if known is not None and transfer.unchanged:
            known.path.replace(to)
            return replace(known, path=to)
        await asyncio.to_thread(_judge_head, part, source)
        # Not synced: after a power cut the next attempt downloads again, and syncing 2 GiB would delay every job.
        part.replace(to)
    except _TransferBroken as error:
        raise _not_now(source, str(error), is_stored) from error
    except TimeoutError as error:
        raise _not_now(source, f"it took longer than {MAX_SECONDS / 60:.0f} minutes", is_stored) from error
    except OSError as error:
        raise disk_fault("work folder", to.parent, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    validator = transfer.version.strong_etag if transfer.version is not None else None
    return FetchedDataset(to, transfer.received, transfer.digest.hexdigest(), source, validator)


async def _continue(client: httpx.AsyncClient, rules: AddressRules, url: str, transfer: _Transfer) -> None:
    """Makes one try: asks for what is missing, follows redirects by the rules, writes what arrives."""
    headers = {"Accept-Encoding": "identity", "Accept": "*/*"}
    if transfer.received and transfer.version is not None and transfer.version.can_be_continued:
        headers["Range"] = f"bytes={transfer.received}-"
        if transfer.version.strong_etag:
            # Saves a request where it is heeded. What comes back is compared all the same.
            headers["If-Range"] = transfer.version.strong_etag
    elif transfer.received:
        await asyncio.to_thread(transfer.restart)
    if not transfer.received and transfer.known:
        headers["If-None-Match"] = transfer.known
    try:
        target = await _checked(rules, url, transfer.source)
        for _ in range(MAX_REDIRECTS + 1):
            response = await client.send(target.request(client, "GET", headers=headers), stream=True)
            try:
                if not response.has_redirect_location:
                    await _receive(response, transfer)
                    return
                onward = str(target.url.join(response.headers["location"]))
            finally:
                await response.aclose()
            target = await _checked(rules, onward, transfer.source)
    except httpx.InvalidURL as error:
        raise _rejected(transfer.source, "it redirects to something that is not a URL") from error
    except (httpx.TransportError, httpx.DecodingError) as error:
        raise _TransferBroken(
            f"the connection failed after {transfer.received:,} bytes ({type(error).__name__})"
        ) from error
    raise _rejected(transfer.source, f"it redirects more than {MAX_REDIRECTS} times")


async def _receive(response: httpx.Response, transfer: _Transfer) -> None:
    status = response.status_code
    if status == 304 and transfer.known and not transfer.received:
        tag, transfer.known = transfer.known, None
        if response.headers.get("etag", tag).removeprefix("W/") != tag:
            raise _TransferBroken("the server called another version unchanged")
        transfer.unchanged = True
        return
    if status == 416 and transfer.received:
        # The file is shorter than what we have, or as long: it has changed, for all of the old one would have arrived.
        await asyncio.to_thread(transfer.restart)
        raise _TransferBroken("the file changed while it was read")
    if status not in (200, 206):
        await _refuse(response, transfer)
    await _accept_version(response, transfer)
    announced = transfer.received + int(response.headers.get("content-length") or 0)
    if announced > transfer.max_bytes:
        raise _too_large(transfer, f"{announced:,} bytes")
    # In the network's own pieces: with a fixed size, httpx would drop its buffer on an interruption.
    async for piece in response.aiter_bytes():
        if transfer.received + len(piece) > transfer.max_bytes:
            raise _too_large(transfer, f"more than {transfer.max_bytes:,} bytes")
        await asyncio.to_thread(transfer.write, piece)
    total = transfer.version.total_bytes if transfer.version is not None else None
    if total is not None and transfer.received < total:
        raise _TransferBroken(f"the server sent {transfer.received:,} of {total:,} bytes")


async def _accept_version(response: httpx.Response, transfer: _Transfer) -> None:
    """Compares the answer with what is on disk, which goes on from here or is begun anew."""
    version = version_of(response)
    if transfer.received and response.status_code == 200:
        await asyncio.to_thread(transfer.restart)
    if transfer.received and transfer.version is not None:
        difference = transfer.version.difference(version, transfer.received)
    else:
        difference = None if version.first_byte == 0 else "the server sent a part that it was not asked for"
    if difference is not None:
        await asyncio.to_thread(transfer.restart)
        raise _TransferBroken(difference)
    if not transfer.received:
        transfer.version = version


async def _refuse(response: httpx.Response, transfer: _Transfer) -> None:
    """Turns an error status into the exception that says what to do."""
    status, source = response.status_code, transfer.source
    body = await _head_of(response)
    if transfer.received and _IS_RANGE_REFUSED.search(body):
        await asyncio.to_thread(transfer.restart)
        raise _TransferBroken("the file changed while it was read")
    code = _storage_code(body)
    if code == "InvalidJWT" or status in (401, 403):
        raise _rejected(source, f"the server refuses the URL as expired or not allowed (HTTP {status})")
    if is_transient(status):
        raise _TransferBroken(f"the server answered HTTP {status}", retry_after_seconds(response))
    raise _rejected(source, f"the server answered HTTP {status}{f' ({code})' if code else ''}")


async def _head_of(response: httpx.Response) -> bytes:
    async for piece in response.aiter_bytes(2048):
        return piece
    return b""


def _storage_code(body: bytes) -> str | None:
    """Finds the error code in the body: Supabase Storage answers with HTTP 400 and puts the real reason there."""
    found = re.search(rb'"error"\s*:\s*"([A-Za-z_ ]{1,40})"', body)
    return found.group(1).decode() if found else None


async def _checked(rules: AddressRules, url: str, source: str) -> Target:
    try:
        return await rules.check(url)
    except AddressRefused as error:
        reason = f"is at an address that is not allowed: {error}"
        raise _Rejected(_forbidden(f"the dataset {source} {reason}", _PUBLIC_ONLY), f"it {reason}") from error
    except AddressUnknown as error:
        raise _TransferBroken(str(error)) from error


_PUBLIC_ONLY = "use an https URL on a public host, or upload the dataset to the project's storage"


def _judge_head(file: Path, source: str) -> None:
    """Refuses what is plainly not a dataset before a child is started for it. The trainer validates the rows."""
    with file.open("rb") as stream:
        head = stream.read(1024)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        raise _not_a_dataset(source, "is empty", "upload a file with at least one conversation")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise _not_a_dataset(source, "is a web page, not a dataset", "use the link of the file itself, not of its page")
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PAR1")):
        raise _not_a_dataset(source, "is compressed or binary", "upload it as plain JSON Lines")


def _not_a_dataset(source: str, what: str, hint: str) -> JobFailed:
    return JobFailed(ErrorCode.DATASET_INVALID, f"the dataset {source} {what}", hint)


def _too_large(transfer: _Transfer, size: str) -> JobFailed:
    return JobFailed(
        ErrorCode.DATASET_INVALID,
        f"the dataset {transfer.source} is too large: it has {size}, and at most {transfer.max_bytes:,} are allowed",
        "make the dataset smaller, or ask the operator to raise TRAINER_MAX_DATASET_BYTES",
    )


def _rejected(source: str, why: str) -> _Rejected:
    failed = JobFailed(ErrorCode.DATASET_UNREACHABLE, _not_downloaded(source, why), _SUBMIT_AGAIN)
    return _Rejected(failed, why)


def _not_now(source: str, why: str, is_stored: bool) -> JobDelayed:
    message = _not_downloaded(source, why)
    if is_stored:
        return StorageAway(ErrorCode.DATASET_UNREACHABLE, message, _NOT_THE_JOB)
    return JobDelayed(ErrorCode.DATASET_UNREACHABLE, message, _SUBMIT_AGAIN)


def _not_downloaded(source: str, why: str) -> str:
    return f"the dataset {source} could not be downloaded: {why}"


def _forbidden(message: str, hint: str) -> JobFailed:
    return JobFailed(ErrorCode.DATASET_FORBIDDEN, message, hint)
