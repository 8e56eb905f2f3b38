"""A small resumable upload client: TUS 1.0.0 as Supabase Storage implements it.

Existing clients either have no timeouts, retry what cannot succeed, or mistake the same file under another
name for done. This one keeps three rules: after any failure it asks the server (HEAD) how much it has;
the upload's address is on disk before the first byte is sent, so that it outlives this process; and
a file is read one piece at a time.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import httpx
import structlog
import tenacity

from daemon.errors import TrainerError
from daemon.network.endpoint_client import beneath_endpoint
from daemon.network.retry_after import is_page, is_transient, retry_after_seconds, said_by_page
from training.files.durable_files import write_whole

log = structlog.get_logger()

# Supabase requires chunks of exactly 6 MiB, except the last.
CHUNK_BYTES = 6 * 1024 * 1024
PIECE_BYTES = 256 * 1024

# After the last chunk the server assembles the object before it answers.
TIMEOUT = httpx.Timeout(60.0, connect=10.0, read=180.0)

# Give up after this many tries in a row that brought the server no new byte; any progress resets the count.
FRUITLESS_TRIES = 8
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
# The name of a file with an upload's address ends so.
RESUME_SUFFIX = ".upload.json"
_VERSION = {"Tus-Resumable": "1.0.0"}


class UploadRefused(TrainerError):
    """The server refuses and would refuse again. `status` and `code` are Storage's own, from the body."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.status = status
        self.code = code
        self.message = message


class UploadGone(TrainerError):
    """The server no longer knows this upload: it finished long ago, expired, or never began."""


class UploadInterrupted(TrainerError):
    """The transfer stopped and can be resumed. `after_seconds` is the wait that the server asked for."""

    def __init__(self, message: str, after_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.after_seconds = after_seconds


@dataclass(frozen=True)
class ResumePoint:
    """Which upload was started for which content: what a later process needs to resume it."""

    endpoint: str
    object_name: str
    bytes: int
    sha256: str
    url: str

    def save(self, file: Path) -> None:
        """Writes atomically, readable by us only: the address is as good as a permission to write."""
        write_whole(file, json.dumps(asdict(self)), mode=0o600)


def load_resume_point(file: Path) -> ResumePoint | None:
    """Reads what an earlier process left; None if it is missing or unreadable: then the upload starts again."""
    try:
        return ResumePoint(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


class TusUpload:
    """One upload of a file to an object. Call `run` until it returns; each call resumes at the server's offset."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        endpoint: str,
        headers: Mapping[str, str],
        metadata: Mapping[str, str],
        local: Path,
        *,
        sha256: str,
        resume_file: Path,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ) -> None:
        self._client = client
        self._endpoint = endpoint
        self._headers = {**headers, **_VERSION}
        self._metadata = metadata
        self._local = local
        self._size = local.stat().st_size
        self._sha256 = sha256
        self._resume_file = resume_file
        self._first_wait_seconds = first_wait_seconds
        self._url = self._remembered_url()
        self._best_offset = 0
        self._fruitless = 0
        self._moved = False

    async def run(self) -> None:
        """Sends what the server lacks. Raises UploadRefused, UploadGone or, after too many tries, UploadInterrupted."""
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(UploadInterrupted),
            stop=self._out_of_patience,
            wait=self._pause,
            reraise=True,
        ):
            with attempt:
                try:
                    await self._attempt()
                except httpx.TransportError as error:
                    raise UploadInterrupted(f"the connection failed ({type(error).__name__})") from error

    def forget(self) -> None:
        """Drops the saved upload: it is done, or no longer exists."""
        self._url = None
        self._resume_file.unlink(missing_ok=True)

    async def _attempt(self) -> None:
        url, offset = self._url, 0
        if url is None:
            url = self._url = await self._create()
        else:
            offset = await self._ask_offset(url)
        with self._local.open("rb") as file:
            while offset < self._size:
                offset = await self._send_chunk(url, file, offset)

    async def _create(self) -> str:
        url = await begin_upload(self._client, self._endpoint, self._headers, self._metadata, self._size)
        self._resume_point(url).save(self._resume_file)
        return url

    async def _ask_offset(self, url: str) -> int:
        response = await self._client.head(url, headers=self._headers)
        if response.status_code not in (200, 204):
            raise refusal(response)
        return self._accept_offset(response)

    async def _send_chunk(self, url: str, file: BinaryIO, offset: int) -> int:
        length = min(CHUNK_BYTES, self._size - offset)
        headers = {
            **self._headers,
            "Upload-Offset": str(offset),
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(length),
        }
        response = await self._client.patch(url, headers=headers, content=_pieces(file, offset, length))
        if response.status_code != 204:
            raise refusal(response)
        reached = self._accept_offset(response)
        if reached <= offset:
            raise UploadInterrupted(f"the server took a chunk and stayed at {offset:,} bytes")
        return reached

    def _accept_offset(self, response: httpx.Response) -> int:
        text = response.headers.get("upload-offset", "")
        if not text.isdigit() or int(text) > self._size:
            raise UploadInterrupted(f"the server reports an offset of {text[:30]!r} for a file of {self._size:,} bytes")
        offset = int(text)
        if offset > self._best_offset:
            self._best_offset, self._moved = offset, True
        return offset

    def _resume_point(self, url: str) -> ResumePoint:
        return ResumePoint(self._endpoint, self._metadata["objectName"], self._size, self._sha256, url)

    def _remembered_url(self) -> str | None:
        point = load_resume_point(self._resume_file)
        if point is None or point != self._resume_point(point.url):
            return None
        with contextlib.suppress(ValueError):
            return beneath_endpoint(self._endpoint, point.url)
        return None

    def _out_of_patience(self, _state: tenacity.RetryCallState) -> bool:
        self._fruitless = 1 if self._moved else self._fruitless + 1
        self._moved = False
        return self._fruitless >= FRUITLESS_TRIES

    def _pause(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.after_seconds if isinstance(error, UploadInterrupted) else 0.0
        log.info("upload_interrupted", object=self._metadata["objectName"], offset=self._best_offset, reason=str(error))
        return min(max(self._first_wait_seconds * 2.0 ** (self._fruitless - 1), asked), LONGEST_WAIT_SECONDS)


async def begin_upload(
    client: httpx.AsyncClient, endpoint: str, headers: Mapping[str, str], metadata: Mapping[str, str], size: int
) -> str:
    """Creates an upload of `size` bytes, none of them sent yet, and returns its address. Raises what `refusal` says."""
    encoded = ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in metadata.items())
    asked = {"Upload-Length": str(size), "Upload-Metadata": encoded, "Content-Length": "0"}
    response = await client.post(endpoint, headers={**headers, **_VERSION, **asked})
    if response.status_code != 201 or "location" not in response.headers:
        raise refusal(response)
    try:
        # Only its path: behind a TLS proxy the server may call itself http://, and our key is in every request.
        return beneath_endpoint(endpoint, response.headers["location"])
    except ValueError as error:
        raise UploadRefused(502, "BadLocation", f"the upload's address is unusable: {error}") from error


async def end_upload(client: httpx.AsyncClient, url: str, headers: Mapping[str, str]) -> None:
    """Deletes an unfinished upload on the server; one that is finished or gone is no error."""
    response = await client.delete(url, headers={**headers, **_VERSION})
    # 400: it cannot be ended any more, because it is whole.
    if response.status_code not in (200, 204, 400, 404, 410):
        raise refusal(response)


def unfinished_uploads(folder: Path) -> list[tuple[Path, ResumePoint]]:
    """Lists the uploads that were begun from this folder and not finished, each with the file that says so."""
    found = ((file, load_resume_point(file)) for file in sorted(folder.rglob(f"*{RESUME_SUFFIX}")))
    return [(file, point) for file, point in found if point is not None]


def refusal(response: httpx.Response) -> UploadRefused | UploadGone | UploadInterrupted:
    """Classifies an error response. Storage puts the real status into the body of an HTTP 400, as a string."""
    status, code, message = unfold_error(response)
    begun = response.request.method != "POST"
    # 423: an earlier request of ours still locks the upload. 409: a duplicate is permanent; a wrong offset is not.
    if is_transient(status) or (status == 409 and begun and "already exists" not in message):
        return UploadInterrupted(f"the storage answered {status} {message or code}", retry_after_seconds(response))
    # A HEAD is refused without a word: 400 is an upload that is none, or a key that is not accepted. Whoever goes on
    # hears which.
    if begun and (status in (404, 410) or (status == 400 and response.request.method == "HEAD")):
        return UploadGone(f"the storage no longer knows the upload ({status})")
    return UploadRefused(status, code, message)


def unfold_error(response: httpx.Response) -> tuple[int, str, str]:
    """(status, code, message) of a Storage error: {"statusCode": "404", "code": "NoSuchKey", "message": "…"}.

    Resumable uploads are refused in plain text with the real status."""
    status, code, message = response.status_code, response.reason_phrase or "error", ""
    if is_page(response):
        return status, "error", said_by_page(status)
    try:
        body = response.json()
        status = int(body.get("statusCode") or status)
        # `error` is the older name of the same; where it is a sentence, `code` is still a word.
        code = str(body.get("code") or body.get("error") or code)
        message = str(body.get("message") or "")
    except (ValueError, TypeError, AttributeError):
        # The header proves that the upload server itself says it: another server's text reaches no row.
        if "tus-resumable" in response.headers:
            message = " ".join(response.text.split())
    return status, code[:100], message[:300]


async def _pieces(file: BinaryIO, offset: int, length: int) -> AsyncIterator[bytes]:
    """`length` bytes from `offset`, read off the event loop."""
    position = offset
    while position < offset + length:
        piece = await asyncio.to_thread(os.pread, file.fileno(), min(PIECE_BYTES, offset + length - position), position)
        if not piece:
            raise UploadRefused(400, "FileShrank", f"the file ended at {position:,} bytes while it was sent")
        position += len(piece)
        yield piece
