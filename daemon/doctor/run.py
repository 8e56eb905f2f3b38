"""Runs all checks and shows whether this host can work, and for each fault what to do.

Every check really does what the daemon will do: listen, write and delete a file, multiply through a 4-bit
layer; only a claim is left out. A check that cannot run says so; none is skipped silently.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from daemon.doctor.check_result import CheckResult, Status
from daemon.doctor.endpoint_check import check_endpoint
from daemon.doctor.host_checks import check_device, check_disk, check_model, check_python, check_trainer
from daemon.doctor.service_checks import (
    check_callbacks,
    check_database,
    check_pod,
    check_storage,
    check_unfinished_uploads,
)
from daemon.settings import Settings


async def examine(settings: Settings) -> AsyncIterator[CheckResult]:
    """Yields all results in the order of the screen, each as soon as it is known."""
    yield check_python()
    yield check_device(settings)
    async for finding in check_trainer(settings):
        yield finding
    async for finding in check_model(settings):
        yield finding
    for name, folder in (("work folder", settings.work_dir), ("models folder", settings.models_dir)):
        yield await asyncio.to_thread(check_disk, name, folder)
    async for finding in check_database(settings):
        yield finding
    yield await check_storage(settings)
    yield await asyncio.to_thread(check_unfinished_uploads, settings)
    yield check_callbacks(settings)
    async for finding in check_endpoint(settings):
        yield finding
    yield await check_pod(settings)


Show = Callable[[CheckResult], None]


def run_doctor(settings: Settings, show: Show) -> int:
    """Shows each result as it comes. Exit status 1 if anything is red."""

    async def all_findings() -> int:
        worst = 0
        async for finding in examine(settings):
            show(finding)
            worst = max(worst, int(finding.light is Status.RED))
        return worst

    work: Coroutine[Any, Any, int] = all_findings()
    return asyncio.run(work)
