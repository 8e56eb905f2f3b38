"""Runs one export of an adapter in a process of its own (`python -m training.export`), without secrets or the hub."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any

from daemon.errors import HostFault, JobFailed
from daemon.trainer.environment import child_environment
from training.events import ErrorCode

EXPORT_COMMAND: tuple[str, ...] = (sys.executable, "-m", "training.export")

LOWEST_PRIORITY = 19

OnBytes = Callable[[int, int], None]  # bytes done, total bytes

_STDERR_TAIL_BYTES = 4000
# A line holds the result, which lists each file of a model.
_LINE_BYTES = 2**24
# It says several times a second how far it is, but for work of minutes. A process that hangs would hold its host, and
# its delivery, for ever.
SILENT_SECONDS = 3600.0


async def run_export(
    request: Mapping[str, Any], on_bytes: OnBytes = lambda _done, _total: None, *, gently: bool = False
) -> dict[str, Any]:
    """Returns the result of the export that `request["kind"]` names. Cancelling it ends the process.

    `gently`: jobs may be training on this host, and have the processors first.
    Raises JobFailed with the process's own code, message and hint; HostFault(trainer) if it ended or hung, wordless.
    """
    with tempfile.TemporaryFile() as stderr:
        process = await asyncio.create_subprocess_exec(
            *EXPORT_COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            limit=_LINE_BYTES,
            # On the CPU: a card may be training meanwhile.
            env=child_environment(os.environ, []) | {"TRANSFORMERS_VERBOSITY": "error"},
        )
        if gently:
            # Before it has threads, which inherit it.
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, process.pid, LOWEST_PRIORITY)
        try:
            answer = await _answer(process, request, on_bytes)
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if answer is None:
            raise _ended_early(status, stderr)
    if answer["kind"] == "failed":
        raise JobFailed(ErrorCode(answer["code"]), answer["message"], answer["hint"])
    result: dict[str, Any] = answer["result"]
    return result


async def _answer(
    process: asyncio.subprocess.Process, request: Mapping[str, Any], on_bytes: OnBytes
) -> dict[str, Any] | None:
    """Its last line, `done` or `failed`; None if it ended before it."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(dict(request), default=str).encode())
    process.stdin.close()
    while text := await _next_line(process.stdout):
        line = json.loads(text)
        if line["kind"] != "progress":
            return dict(line)
        on_bytes(line["done_bytes"], line["total_bytes"])
    return None


async def _next_line(stdout: asyncio.StreamReader) -> bytes:
    try:
        async with asyncio.timeout(SILENT_SECONDS):
            return await stdout.readline()
    except TimeoutError:
        words = f"said nothing for {SILENT_SECONDS / 60:.0f} minutes, and was ended"
        raise HostFault(
            "trainer",
            ErrorCode.INTERNAL,
            f"The process that exports the adapter {words}.",
            detail=f"the process that exports the adapter {words}",
        ) from None


def _ended_early(status: int, stderr: IO[bytes]) -> HostFault:
    stderr.seek(0)
    lines = stderr.read()[-_STDERR_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    return HostFault(
        "trainer",
        ErrorCode.INTERNAL,
        f"The process that exports the adapter {how}.",
        detail=f"the process that exports the adapter {how}" + (f": {lines[-1][:300]}" if lines else ""),
    )
