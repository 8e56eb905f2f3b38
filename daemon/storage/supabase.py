"""Supabase Storage, as an implementation of daemon.storage.interface.

The vendor's client is used for what it does well (signing, queries, buckets, small uploads, deleting). Large files
go through daemon.storage.tus, and every object is read back and hashed before it counts as stored.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
import structlog
import tenacity
from storage3 import AsyncStorageClient
from storage3.exceptions import StorageApiError

from daemon.errors import HostFault, JobFailed, StorageAway, disk_fault
from daemon.network.endpoint_client import at_endpoint, endpoint_client
from daemon.storage import tus
from daemon.storage.interface import (
    DatasetSource,
    Location,
    SignedUrl,
    StoredObject,
    dataset_absent,
    object_absent,
    safe_object_path,
    upload_mismatch,
)
from daemon.storage.object_types import STORED_TYPES, takes, type_of
from daemon.storage.refusals import Absent, job_error, may_pass, reason_of, refuses_the_key
from daemon.storage.service_key import direct_host, key_fault
from daemon.storage.tus import RESUME_SUFFIX, TusUpload, UploadGone, UploadInterrupted, UploadRefused
from daemon.storage.unfinished_uploads import STANDARD_UPLOAD_BYTES, end_unfinished_uploads, probe_upload
from training.events import ErrorCode
from training.files.durable_files import READ_BYTES, beside, put_in_place, sync

log = structlog.get_logger()

# Long enough for the largest dataset, short enough that a URL in an old log is worthless.
SIGNED_SECONDS = 3600
# Six tries are 15 seconds of patience at least: the pauses double, and jitter only adds to them. With pauses drawn from
# zero an attempt sometimes ended 2 seconds after Storage had gone.
TRIES = 6
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 20.0
# A TUS upload that the server has forgotten is started again, up to this many times.
BEGINNINGS = 3

Result = TypeVar("Result")


class SupabaseStorage:
    """The Storage of one project, by its URL and service key."""

    def __init__(
        self,
        url: str,
        service_key: str,
        bucket: str = "lora-models",
        *,
        large_files_url: str | None = None,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ) -> None:
        self._location = Location(url.rstrip("/"), bucket)
        self._base = f"{url.rstrip('/')}/storage/v1"
        self._tus_endpoint = f"{large_files_url or direct_host(url.rstrip('/'))}/storage/v1/upload/resumable"
        self._key_fault = key_fault(url, service_key)
        self._bucket = bucket
        self._first_wait_seconds = first_wait_seconds
        self._headers = {"apikey": service_key}
        if not service_key.startswith("sb_"):
            # The newer keys are not JWTs: the gateway exchanges them, and refuses them as bearer tokens.
            self._headers["Authorization"] = f"Bearer {service_key}"
        # The vendor's timeout of 20 seconds cuts long answers off; its HTTP/2 hides which request hangs.
        self._client = endpoint_client(self._base, self._tus_endpoint, timeout=httpx.Timeout(60.0, connect=10.0))
        self._api = AsyncStorageClient(f"{self._base}/", self._headers, http_client=self._client)

    @property
    def bucket(self) -> str:
        return self._bucket

    @property
    def location(self) -> Location:
        return self._location

    async def close(self) -> None:
        await self._client.aclose()

    async def open_dataset(self, bucket: str, path: str) -> DatasetSource:
        async def sign() -> str:
            signed = await self._api.from_(bucket).create_signed_url(safe_object_path(path), SIGNED_SECONDS)
            return at_endpoint(self._base, str(signed["signedURL"]))

        try:
            return SignedUrl(await self._retried(sign, f"signing {bucket}/{path}", ErrorCode.DATASET_UNREACHABLE))
        except Absent as error:
            await self._require_bucket_of(bucket, path)
            raise dataset_absent(bucket, path) from error

    async def exists(self, object_path: str) -> bool:
        return await self._stored_size(object_path) is not None

    async def _is_there(self, object_path: str) -> bool:
        """False too if the storage does not say."""
        try:
            return await self.exists(object_path)
        except StorageAway:
            return False

    async def verify(self, object_path: str, size: int, sha256: str) -> bool:
        stored = await self._stored_size(object_path)
        if stored is None or stored not in (size, _UNKNOWN_SIZE):
            return False

        async def read_back() -> tuple[int, str]:
            digest, received = hashlib.sha256(), 0
            async with self._reading(object_path) as pieces:
                async for piece in pieces:
                    await asyncio.to_thread(digest.update, piece)
                    received += len(piece)
            return received, digest.hexdigest()

        try:
            return await self._retried(read_back, f"reading back {self._bucket}/{object_path}") == (size, sha256)
        except Absent:
            return False

    async def download(self, object_path: str, to: Path) -> StoredObject:
        async def fetch(hidden: Path) -> StoredObject:
            digest, received = hashlib.sha256(), 0
            with hidden.open("wb") as file:
                async with self._reading(object_path) as pieces:
                    async for piece in pieces:
                        await asyncio.to_thread(file.write, piece)
                        digest.update(piece)
                        received += len(piece)
            return StoredObject(object_path, received, digest.hexdigest())

        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            with beside(to) as hidden:
                fetched = await self._retried(lambda: fetch(hidden), f"downloading {self._bucket}/{object_path}")
                # Not in the same thread as the rename: a thread would go on and rename after we were cancelled.
                await asyncio.to_thread(sync, hidden)
                put_in_place(hidden, to)
        except Absent as error:
            raise object_absent(self._bucket, object_path) from error
        except OSError as error:
            raise disk_fault("work folder", to.parent, error) from error
        return fetched

    async def delete(self, object_path: str) -> None:
        async def remove() -> None:
            await self._api.from_(self._bucket).remove([safe_object_path(object_path)])

        try:
            await self._retried(remove, f"deleting {self._bucket}/{object_path}")
        except Absent:
            return

    async def upload(self, local: Path, object_path: str, *, sha256: str, resume_dir: Path) -> StoredObject:
        safe_object_path(object_path)
        size = (await asyncio.to_thread(local.stat)).st_size
        # Storage answers a duplicate before it has read the body, so first check whether our object is there.
        # A name contains its attempt's epoch, so any other object under it is a leftover of our own.
        for _ in range(2):
            if await self.verify(object_path, size, sha256):
                return StoredObject(object_path, size, sha256)
            if await self.exists(object_path):
                log.warning("stored_object_replaced", object=object_path)
                await self.delete(object_path)
            if size <= STANDARD_UPLOAD_BYTES:
                await self._upload_whole(local, object_path)
            else:
                await self._upload_resumable(local, object_path, size, sha256, resume_dir)
        if await self.verify(object_path, size, sha256):
            return StoredObject(object_path, size, sha256)
        raise upload_mismatch(f"{self._bucket}/{object_path}", size, sha256)

    async def prove(self) -> None:
        if self._key_fault is not None:
            message = "The storage key of this host is not the one that it needs."
            raise HostFault("storage", ErrorCode.UPLOAD_FAILED, message, detail=self._key_fault)
        await self._limits()

    async def end_unfinished_uploads(self, folder: Path) -> None:
        await end_unfinished_uploads(self._client, self._headers, folder)

    async def check(self, expected_bytes: int) -> str | None:
        if self._key_fault is not None:
            await self.prove()
        limit, types, public = await self._limits()
        if public:
            log.warning("bucket_is_public", bucket=self._bucket, hint="anybody can download adapters; make it private")
        if limit is not None and expected_bytes > limit:
            raise JobFailed(
                ErrorCode.UPLOAD_FAILED,
                f"the adapter will have about {expected_bytes:,} bytes; a file in the bucket {self._bucket} "
                f"may have {limit:,}",
                "raise the bucket's file size limit, or lower lora_rank",
            )
        refused = [kind for kind in STORED_TYPES if not takes(types, kind)]
        if refused:
            raise JobFailed(
                ErrorCode.UPLOAD_FAILED,
                f"the bucket {self._bucket} accepts only {', '.join(types or [])}, not {', '.join(refused)}",
                "add these MIME types to the list of allowed ones, or remove the list; an entry `*/*` allows none",
            )
        return await self._probe(expected_bytes, limit, types)

    async def _probe(self, size: int, limit: int | None, types: list[str] | None) -> str | None:
        metadata = self._metadata(f"adapters/probe-{uuid4().hex}.tar.gz")
        try:
            return await probe_upload(self._client, self._tus_endpoint, self._headers, metadata, size, limit, types)
        except HostFault as error:
            if not self._leave_direct_host(str(error)):
                raise
            return await self._probe(size, limit, types)

    async def _limits(self) -> tuple[int | None, list[str] | None, bool]:
        """The limits of the bucket for adapters, which is made if it is not there."""

        async def create() -> None:
            try:
                await self._api.create_bucket(self._bucket, options={"public": False})
            except StorageApiError as error:
                # Another daemon created it first.
                if reason_of(error)[0] != 409:
                    raise

        try:
            return await self._look_at(self._bucket)
        except Absent:
            await self._retried(create, f"creating bucket {self._bucket}")
            log.info("bucket_created", bucket=self._bucket)
            return await self._look_at(self._bucket)

    async def _look_at(self, bucket: str) -> tuple[int | None, list[str] | None, bool]:
        async def limits() -> tuple[int | None, list[str] | None, bool]:
            found = await self._api.get_bucket(bucket)
            return found.file_size_limit, found.allowed_mime_types, found.public

        return await self._retried(limits, f"looking at bucket {bucket}")

    async def _require_bucket_of(self, bucket: str, path: str) -> None:
        """An object is absent only in a bucket that we see: a key that may not read is told "not found" as well.

        Raises HostFault if the key sees no bucket, StorageAway if only this one is not there."""
        try:
            await self._look_at(bucket)
        except Absent as error:
            await self.prove()
            raise StorageAway(
                ErrorCode.DATASET_UNREACHABLE,
                f"the dataset {bucket}/{path} cannot be read: the project's storage has no bucket {bucket}",
                "the operator must create the bucket, or correct storage_bucket in the dataset's row",
            ) from error

    def _metadata(self, object_path: str) -> dict[str, str]:
        kind = type_of(object_path)
        return {"bucketName": self._bucket, "objectName": object_path, "contentType": kind, "cacheControl": "3600"}

    async def _upload_whole(self, local: Path, object_path: str) -> None:
        content = await asyncio.to_thread(local.read_bytes)
        tries = 0

        async def send() -> None:
            nonlocal tries
            tries += 1
            # The last try may have stored it although its answer was lost. Storage answers a duplicate before reading
            # the body, which a client sees as a broken connection and never as "Duplicate".
            if tries > 1 and await self.exists(object_path):
                return
            try:
                await self._api.from_(self._bucket).upload(object_path, content, {"content-type": type_of(object_path)})
            except StorageApiError as error:
                # An earlier try stored it after all: the caller reads it back and decides.
                if reason_of(error)[0] != 409:
                    raise

        await self._retried(send, f"uploading {self._bucket}/{object_path} ({len(content):,} bytes)")

    async def _upload_resumable(self, local: Path, object_path: str, size: int, sha256: str, resume_dir: Path) -> None:
        await asyncio.to_thread(resume_dir.mkdir, parents=True, exist_ok=True)
        name = f"uploading {self._bucket}/{object_path} ({size:,} bytes)"
        metadata = self._metadata(object_path)
        for _ in range(BEGINNINGS):
            where = (self._client, self._tus_endpoint, self._headers)
            upload = TusUpload(
                *where,
                metadata,
                local,
                sha256=sha256,
                resume_file=resume_dir / f"{object_path.replace('/', '__')}{RESUME_SUFFIX}",
                first_wait_seconds=self._first_wait_seconds,
            )
            try:
                await upload.run()
            except UploadInterrupted as error:
                # The upload's address stays on disk: the next attempt resumes from it. A name that has an object by now
                # is refused by cutting the connection; the caller reads that object back.
                if await self._is_there(object_path):
                    return
                raise job_error(503, "", str(error), name) from error
            except UploadGone:
                # Finished although the answer was lost, or expired: the caller reads it back and finds out. Forgotten
                # only after an answer, which a key that is not accepted does not get.
                found = await self.exists(object_path)
                upload.forget()
                if found:
                    return
            except UploadRefused as error:
                if refuses_the_key(error.status, error.code):
                    # What is stored is kept: the key may be corrected.
                    if self._leave_direct_host(str(error)):
                        continue
                    raise job_error(error.status, error.code, error.message, name) from error
                upload.forget()
                if error.status == 409:
                    return
                raise job_error(error.status, error.code, error.message, name) from error
            else:
                upload.forget()
                return
        raise job_error(404, "", f"the storage forgot the upload {BEGINNINGS} times", name)

    def _leave_direct_host(self, reason: str) -> bool:
        """Sends large files by the project's URL from now on. False if they go there already."""
        endpoint = f"{self._base}/upload/resumable"
        if self._tus_endpoint == endpoint:
            return False
        # The newer keys are exchanged by the gateway, which the direct host may not have.
        log.warning("direct_storage_host_left", endpoint=endpoint, reason=reason)
        self._tus_endpoint = endpoint
        return True

    async def _stored_size(self, object_path: str) -> int | None:
        """Bytes in storage, None if absent, _UNKNOWN_SIZE if the server does not report a size."""

        async def ask() -> int:
            info = await self._api.from_(self._bucket).info(safe_object_path(object_path))
            size = info.get("size") or (info.get("metadata") or {}).get("size")
            return int(size) if size is not None else _UNKNOWN_SIZE

        try:
            return await self._retried(ask, f"looking for {self._bucket}/{object_path}")
        except Absent:
            return None

    @asynccontextmanager
    async def _reading(self, object_path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        url = f"{self._base}/object/authenticated/{quote(self._bucket)}/{quote(safe_object_path(object_path))}"
        # An answer from a cache proves nothing about what is stored.
        headers = {**self._headers, "Accept-Encoding": "identity", "Cache-Control": "no-cache"}
        async with self._client.stream("GET", url, headers=headers, timeout=tus.TIMEOUT) as response:
            if response.status_code != 200:
                await response.aread()
                status, code, message = tus.unfold_error(response)
                raise StorageApiError(message, code, status)
            yield response.aiter_bytes(READ_BYTES)

    async def _retried(
        self, action: Callable[[], Awaitable[Result]], name: str, code: ErrorCode = ErrorCode.UPLOAD_FAILED
    ) -> Result:
        """Retries transient errors, and turns the remaining ones into an error that a row can show."""
        try:
            async for attempt in tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception(may_pass),
                stop=tenacity.stop_after_attempt(TRIES),
                wait=tenacity.wait_exponential_jitter(
                    self._first_wait_seconds, max=LONGEST_WAIT_SECONDS, jitter=self._first_wait_seconds
                ),
                reraise=True,
            ):
                with attempt:
                    return await action()
        except StorageApiError as error:
            raise job_error(*reason_of(error), name, code) from error
        except httpx.TransportError as error:
            raise job_error(503, "", f"no answer ({type(error).__name__})", name, code) from error
        except ValueError as error:
            message = "the answer is not Supabase Storage's; check SUPABASE_URL"
            raise job_error(502, "", message, name, code) from error
        raise AssertionError("tenacity either returned or raised")


# What `_stored_size` returns when the server does not report a size.
_UNKNOWN_SIZE = -1
