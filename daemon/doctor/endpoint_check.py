"""The doctor's check of the endpoint that serves finished adapters: it answers, and has this host's default model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from daemon.doctor.check_result import CheckResult, green, red, yellow
from daemon.serving.endpoint_api import Endpoint, EndpointError
from daemon.serving.fit import served_base
from daemon.settings import Settings


async def check_endpoint(settings: Settings) -> AsyncIterator[CheckResult]:
    """Yields nothing where there is no endpoint."""
    if settings.endpoint_url is None:
        return
    name = "endpoint"
    try:
        async with Endpoint(settings) as endpoint:
            served = await endpoint.models()
    except EndpointError as error:
        advice = "check TRAINER_ENDPOINT_URL and TRAINER_ENDPOINT_KEY; jobs train, and their adapters wait"
        yield red(name, f"{settings.endpoint_url}: {error.message}", advice)
        return
    bases = ", ".join(model.id for model in served if model.parent is None) or "no base model"
    adapters = sum(model.parent is not None for model in served)
    said = (
        f"serves {bases} and {adapters} adapter{'' if adapters == 1 else 's'}, ranks up to {settings.endpoint_max_rank}"
    )
    if served_base(settings, served, settings.default_model) is None:
        advice = (
            "adapters of the default model will not be served there; TRAINER_ENDPOINT_BASE_MODEL says what it serves"
        )
        yield yellow(name, f"{said}; not {settings.default_model}", advice)
    else:
        yield green(name, said)
    if settings.endpoint_dir is not None:
        fault = await asyncio.to_thread(_fault_of, settings.endpoint_dir)
        advice = "set TRAINER_ENDPOINT_DIR to a folder that this host can write and the endpoint can read"
        yield red("endpoint folder", fault, advice) if fault else green("endpoint folder", f"{settings.endpoint_dir}")


def _fault_of(folder: Path) -> str | None:
    probe = folder / ".doctor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None
