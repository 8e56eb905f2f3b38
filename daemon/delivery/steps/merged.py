"""The whole model: the base with the adapter in it, for servers that read no adapters."""

from __future__ import annotations

from typing import Any

from daemon.delivery.context import DeliveryContext
from daemon.delivery.delivery import Delivery
from daemon.delivery.exported import export_and_store
from daemon.settings import Settings


def lacks(settings: Settings) -> str | None:
    """Every host that trains can do it."""
    del settings
    return None


async def deliver(delivery: Delivery, context: DeliveryContext) -> dict[str, Any]:
    return await export_and_store(delivery, context, is_model=True)
