"""Turns every way a run can fail into a message for users: what happened, with values, and what to do.

This is the only place where a library's exception becomes an error code.
"""

from __future__ import annotations

import errno
import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from training.events import ErrorCode, HostPart, RunFailed
from training.spec import JobSpec

# Messages of drivers and libraries that ran out of memory without raising torch.OutOfMemoryError.
_OUT_OF_MEMORY_SIGNS = (
    "out of memory",
    "cublas_status_alloc_failed",
    "can't allocate memory",
    "not enough memory",
)
_ASKED_BYTES = re.compile(r"[Tt]ried to allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))")
_MODEL_FILES = (".json", ".safetensors", ".model", ".jinja")
_DISK_FULL_SIGNS = ("no space left on device", "disk quota exceeded")
# What the operating system reports for a volume that is gone, read-only or broken. The trainer writes nowhere else.
_VOLUME_ERRORS = {
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.ESTALE,
    errno.ENODEV,
    errno.ENXIO,
}
# Messages of PyTorch and the driver when the GPU is gone (c10/cuda and NVIDIA's Xid list).
_GPU_LOST_SIGNS = (
    "no cuda gpus are available",
    "found no nvidia driver",
    "cuda driver initialization failed",
    "cuda-capable device(s) is/are busy or unavailable",
    "no cuda-capable device is detected",
    "uncorrectable ecc error",
    "gpu is lost",
    "has fallen off the bus",
    "unknown error",
)


class TrainingFailed(Exception):
    """The run cannot go on. `message` and `hint` are written for users."""

    def __init__(
        self, code: ErrorCode, message: str, hint: str, *, transient: bool = False, host: HostPart | None = None
    ) -> None:
        super().__init__(message)
        self.host = host
        self.code = code
        self.message = message
        self.hint = hint
        self.transient = transient


class StopRequested(Exception):
    """The daemon asked us to stop and everything worth keeping is on disk."""


@dataclass(frozen=True)
class Diagnosis:
    """An exception translated into an error code, a message and a hint."""

    code: ErrorCode
    message: str
    hint: str
    transient: bool
    host: HostPart | None = None


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True for torch.OutOfMemoryError and for the RuntimeErrors that mean the same."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY_SIGNS)


def is_disk_full(error: BaseException) -> bool:
    """Returns True for ENOSPC and EDQUOT, also where a library wrapped them in its own exception."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error).lower() for sign in _DISK_FULL_SIGNS)


def diagnose(error: BaseException, spec: JobSpec | None) -> Diagnosis:
    """Explains an exception to the user. An unknown one is our fault: `internal`, with its type."""
    if isinstance(error, TrainingFailed):
        return Diagnosis(error.code, error.message, error.hint, error.transient, error.host)
    if is_disk_full(error):
        return Diagnosis(
            ErrorCode.DISK_FULL,
            f"the disk is full: {error.strerror if isinstance(error, OSError) else 'no space left on device'}",
            "free space in the work folder or on the models volume, then submit again",
            transient=False,
            host="work folder",
        )
    if is_out_of_memory(error):
        return Diagnosis(ErrorCode.OUT_OF_MEMORY, _out_of_memory(error, spec), memory_advice(spec), transient=False)
    return Diagnosis(
        ErrorCode.INTERNAL,
        f"the trainer failed unexpectedly ({type(error).__name__})",
        "submit again; if it fails the same way, send the error stack to the operator",
        transient=True,
        host=broken_part(error),
    )


def broken_part(error: BaseException) -> HostPart | None:
    """Returns the broken part of this host, if the error names it and no job could have caused it."""
    if isinstance(error, ImportError):
        return "trainer"
    if isinstance(error, OSError) and error.errno in _VOLUME_ERRORS:
        return "work folder"
    words = str(error).lower()
    if isinstance(error, RuntimeError) and "cuda" in words and any(sign in words for sign in _GPU_LOST_SIGNS):
        return "GPU"
    return None


def memory_advice(spec: JobSpec | None, max_length: int | None = None) -> str:
    """Returns the advice for running out of memory, with the values that the job has now."""
    if spec is None:
        return "reduce batch_size, lora_rank or max_length"
    chosen = spec.hyperparameters
    length = max_length or chosen.max_length or "taken from the data"
    return (
        f"reduce batch_size (current {chosen.batch_size}), lora_rank (current {chosen.lora_rank}) "
        f"or max_length (current {length}), or ask for a GPU with more memory"
    )


def failed_event(error: BaseException, spec: JobSpec | None, job_id: str) -> RunFailed:
    """Returns the last event of a failed run, with the stack for the operator."""
    found = diagnose(error, spec)
    return RunFailed(
        job_id=job_id,
        code=found.code,
        message=found.message,
        hint=found.hint,
        stack="".join(traceback.format_exception(error))[-16_000:],
        transient=found.transient,
        host=found.host,
    )


def in_brief(error: BaseException) -> str:
    """Returns the first sentence of what a library's exception says, for a message of ours. The stack has all of it.

    Of an error of the operating system, the file's name at most: where it lies is the operator's business."""
    if isinstance(error, OSError) and error.strerror:
        name = Path(str(error.filename or "")).name
        return f"{error.strerror}: {name}" if name.endswith(_MODEL_FILES) else error.strerror
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0].rstrip(" .")[:200] if lines else type(error).__name__


def _out_of_memory(error: BaseException, spec: JobSpec | None) -> str:
    memory = "the host's memory" if spec is not None and spec.device == "cpu" else "the GPU's memory"
    asked = _ASKED_BYTES.search(str(error))
    return f"{memory} is full" + (f": {asked[1]} more were needed" if asked else "")
