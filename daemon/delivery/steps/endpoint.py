"""The adapter at the operator's endpoint: done when it has answered there."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from daemon.database.statements import statement
from daemon.delivery.context import DeliveryContext
from daemon.delivery.delivery import Delivery
from daemon.errors import JobDelayed, JobFailed
from daemon.serving.deployment import MOST_PROMPTS, Order, Taken, deploy, read_adapter
from daemon.settings import Settings
from training.events import ErrorCode
from training.files.template_options import template_options
from training.spec import SpecInvalid, parse_row


def lacks(settings: Settings) -> str | None:
    """Only a host that knows an endpoint can do it."""
    return None if settings.endpoint_url is not None else "TRAINER_ENDPOINT_URL is not set"


async def deliver(delivery: Delivery, context: DeliveryContext) -> dict[str, Any]:
    folder = await context.adapter_folder()
    try:
        rank, modules = await asyncio.to_thread(read_adapter, folder)
        asked = parse_row(delivery.hyperparameters, {}).hyperparameters
    except (OSError, ValueError, KeyError, TypeError, SpecInvalid) as error:
        raise JobFailed(
            ErrorCode.ENDPOINT_FAILED,
            "The adapter's own config cannot be read.",
            "This is a fault of the service, not of your job. Report it with the job's id.",
            detail=str(error),
        ) from error
    repository = asked.push_to_hub
    known = await _read(context, delivery, repository)
    if context.settings.endpoint_dir is None and repository is not None:
        _check_push(repository, known["hub_state"])
    options = await asyncio.to_thread(template_options, folder)
    order = Order(
        job_id=delivery.job_id,
        base_model=delivery.model_name or "",
        rank=rank,
        modules=modules,
        prompts=asked.sample_prompts or tuple(known["prompts"]),
        adapter_sha256=delivery.adapter_sha256 or "",
        repository=repository,
        name=delivery.target or None,
        take_name=partial(_take_name, context, delivery),
        template_options=options or {},
    )
    return await deploy(order, folder, context.settings)


def _check_push(repository: str, state: str | None) -> None:
    """The endpoint takes the adapter from the hub: it must be there."""
    if state in ("waiting", "running"):
        raise JobDelayed(
            ErrorCode.ENDPOINT_FAILED,
            f"The adapter is not yet pushed to {repository}.",
            "The endpoint takes it from there: it is tried again.",
        )
    if state != "done":
        raise JobFailed(
            ErrorCode.ENDPOINT_FAILED,
            f"The endpoint takes adapters from the hub, and this one was not pushed to {repository}.",
            "See why in the job's delivery of the kind hub; then ask for both again with redeliver().",
        )


async def _read(context: DeliveryContext, delivery: Delivery, repository: str | None) -> dict[str, Any]:
    asked = {"job_id": delivery.job_id, "most": MOST_PROMPTS, "repository": repository}
    return (await context.database.fetch(statement("read_deployed_adapter"), asked))[0]


async def _take_name(context: DeliveryContext, delivery: Delivery, endpoint: str, name: str, in_use: bool) -> Taken:
    asked = {"job_id": delivery.job_id, "endpoint": endpoint, "name": name, "in_use": in_use}
    taken = (await context.database.fetch(statement("take_served_name"), asked))[0]
    if taken["is_taken"]:
        return Taken(True, tuple(taken["superseded"]))
    whose = "A newer adapter of yours" if taken["is_ours"] else "Somebody else's adapter"
    return Taken(False, why_not=f"{whose} is served as {name}.")
