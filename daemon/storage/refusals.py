"""What a refusal of Supabase Storage means for the job: wait and try again, the host's fault, or the job's end.

Storage answers HTTP 400 and puts the real status, a code and a message into the body. Its resumable uploads answer in
plain text, the gateway in front with JSON of another shape, and a proxy before that with a page.
"""

from __future__ import annotations

import httpx
from storage3.exceptions import StorageApiError

from daemon.errors import HostFault, JobError, JobFailed, StorageAway
from daemon.network.retry_after import is_transient
from daemon.storage import tus
from training.events import ErrorCode

# A missing key is named by the header that the server looks for.
_NO_KEY = "headers must have required property 'authorization'"
_OF_THE_KEY = frozenset({"AccessDenied", "Unauthorized", "InvalidJWT", "InvalidSignature"})
_BY_THE_TYPE = frozenset({"InvalidKey", "InvalidMimeType", "invalid_mime_type"})


class Absent(StorageAway):
    """Object or bucket not found; most callers in this room expect it. Where none does, a bucket has vanished."""


def may_pass(error: BaseException) -> bool:
    if isinstance(error, StorageApiError):
        return is_transient(reason_of(error)[0])
    return isinstance(error, httpx.TransportError)


def reason_of(error: StorageApiError) -> tuple[int, str, str]:
    """Returns Storage's status, code and message, from the answer itself where the vendor's client still has it.

    That client understands one shape of answer, and passes on the whole text of every other."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, httpx.HTTPStatusError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None:
        status, code, message = tus.unfold_error(cause.response)
        return status, code, message or f"HTTP {status} {code}"
    text = str(error.status)
    return int(text) if text.isdigit() else 400, error.code, error.message


def refuses_the_key(status: int, code: str, message: str = "") -> bool:
    return status in (401, 403) or code in _OF_THE_KEY or message == _NO_KEY


def key_refused(what: str, error_code: ErrorCode, reason: str) -> HostFault:
    """The host's fault: its key is not accepted, or may not do this. No job is to blame."""
    return HostFault(
        "storage", error_code, f"The storage refuses the key of this host: {reason}.", detail=f"{what} failed: {reason}"
    )


def job_error(
    status: int, code: str, message: str, name: str, error_code: ErrorCode = ErrorCode.UPLOAD_FAILED
) -> JobError:
    reason = f"{code + ': ' if code and not message.startswith(code) else ''}{message}"
    said = f"{name} failed: {reason}"
    if refuses_the_key(status, code, message):
        return key_refused(name, error_code, reason)
    if status == 413:
        return JobFailed(error_code, said, "raise the file size limit of the bucket or project, or lower lora_rank")
    if status == 415 or code in _BY_THE_TYPE:
        return JobFailed(error_code, said, "the operator must allow this name and MIME type in the bucket")
    if status == 404:
        return Absent(error_code, said, "check that the bucket exists")
    return StorageAway(
        error_code, said, "the next attempt continues from here; if it fails again, check the status of the storage"
    )
