"""Resumable uploads that end before they are whole: the probe before a training, and what ended attempts left.

A limit of the whole project is in no bucket's settings, and only an upload is told of it: so one is begun and deleted
before a training of hours. What an ended attempt left is deleted too: the server itself keeps it for a day.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import httpx
import structlog

from daemon.errors import JobFailed, TrainerError
from daemon.network.endpoint_client import CredentialWithheld
from daemon.storage.refusals import key_refused, refuses_the_key
from daemon.storage.tus import UploadRefused, begin_upload, end_upload, unfinished_uploads
from training.events import ErrorCode

log = structlog.get_logger()

# Above this size Supabase recommends resumable uploads.
STANDARD_UPLOAD_BYTES = 6 * 1024 * 1024


async def probe_upload(  # noqa: PLR0917 - which storage, then what is to be stored there
    client: httpx.AsyncClient,
    endpoint: str,
    headers: Mapping[str, str],
    metadata: Mapping[str, str],
    expected_bytes: int,
    limit: int | None,
    allowed_types: list[str] | None,
) -> str | None:
    """Begins and deletes an upload of an archive of this size. Returns why that could not be tried, None if it could.

    `limit` and `allowed_types` are the bucket's own. Raises JobFailed only when the server says that it takes no such
    file, by its size or its type, and HostFault when it refuses our key. A doubt fails no job."""
    bucket, name, kind = metadata["bucketName"], metadata["objectName"], metadata["contentType"]
    try:
        url = await begin_upload(client, endpoint, headers, metadata, expected_bytes)
    except UploadRefused as error:
        if refuses_the_key(error.status, error.code, error.message):
            raise key_refused(
                f"beginning a resumable upload to {bucket}", ErrorCode.UPLOAD_FAILED, str(error)
            ) from error
        if error.status == 413:
            own = "any" if limit is None else f"{limit:,}"
            raise JobFailed(
                ErrorCode.UPLOAD_FAILED,
                f"the adapter will have about {expected_bytes:,} bytes, and the project's storage takes no file "
                f"of that size: {error.message} (the bucket {bucket} would take {own})",
                "raise the project's own file size limit in its storage settings (50 MB on the free plan), or lower "
                "lora_rank",
            ) from error
        # An empty list refuses resumable uploads alone.
        if error.status == 415 and (allowed_types or expected_bytes > STANDARD_UPLOAD_BYTES):
            listed = ", ".join(allowed_types or []) or "no type at all"
            raise JobFailed(
                ErrorCode.UPLOAD_FAILED,
                f"the bucket {bucket} refuses {kind}: its list of allowed MIME types says {listed}",
                "the operator must remove the list; `*/*` and an empty list refuse every upload of an adapter",
            ) from error
        return _doubtful(str(error))
    except httpx.TransportError as error:
        return _doubtful(f"no answer ({type(error).__name__})")
    except TrainerError as error:
        return _doubtful(str(error))
    try:
        await end_upload(client, url, headers)
    except (httpx.HTTPError, TrainerError) as error:
        log.warning("unfinished_upload_left", object=name, error=str(error))
    return None


def _doubtful(reason: str) -> str:
    doubt = f"a resumable upload could not be tried: {reason}"
    log.warning("upload_probe_doubtful", reason=reason)
    return doubt


async def end_unfinished_uploads(client: httpx.AsyncClient, headers: Mapping[str, str], folder: Path) -> None:
    """Deletes on the server what was begun from this folder and not finished, then forgets it here.

    What cannot be deleted now is left to the server, which forgets an unfinished upload after a day."""
    for file, upload in await asyncio.to_thread(unfinished_uploads, folder):
        try:
            await end_upload(client, upload.url, headers)
        except (CredentialWithheld, httpx.InvalidURL) as error:
            # Begun at another storage than is configured now: that one forgets it by itself.
            log.warning("unfinished_upload_elsewhere", object=upload.object_name, error=str(error))
            continue
        except (httpx.HTTPError, TrainerError) as error:
            log.warning("unfinished_upload_left", object=upload.object_name, error=str(error))
            return
        await asyncio.to_thread(file.unlink, missing_ok=True)
        log.info("unfinished_upload_deleted", object=upload.object_name, bytes=upload.bytes)
