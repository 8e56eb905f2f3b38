"""A push of the adapter to the Hugging Face hub, with the token that the operator keeps for the job's owner."""

from __future__ import annotations

from typing import Any

from daemon.delivery.context import DeliveryContext
from daemon.delivery.delivery import Delivery
from daemon.errors import JobFailed
from daemon.serving.hub_upload import Push
from daemon.serving.push import hub_token, push_adapter
from daemon.settings import Settings
from training.events import ErrorCode


def lacks(settings: Settings) -> str | None:
    """A host without tokens leaves it to others."""
    return None if settings.hub_tokens else "TRAINER_HUB_TOKENS is not set"


async def deliver(delivery: Delivery, context: DeliveryContext) -> dict[str, Any]:
    token = hub_token(context.settings, delivery.user_id)
    if token is None:
        raise JobFailed(
            ErrorCode.UPLOAD_FAILED,
            f"The adapter was not pushed to {delivery.target}: the service has no token of yours for the hub.",
            "The operator adds one to TRAINER_HUB_TOKENS. Or push it yourself: brightrun-trainer push JOB OWNER/NAME",
        )
    folder = await context.adapter_folder()
    order = Push(delivery.target, str(folder), str(delivery.job_id), str(delivery.adapter_sha256), token)
    return await push_adapter(order)
