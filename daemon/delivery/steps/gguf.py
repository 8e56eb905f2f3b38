"""What llama.cpp reads beside a GGUF of the base model: the adapter as a GGUF LoRA."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from daemon.delivery.context import DeliveryContext
from daemon.delivery.delivery import Delivery
from daemon.delivery.exported import export_and_store
from daemon.settings import Settings


def lacks(settings: Settings) -> str | None:
    """Every host that trains can do it, with a small package."""
    del settings
    return None if find_spec("gguf") else 'the package gguf is not installed: pip install "brightrun-trainer[gguf]"'


async def deliver(delivery: Delivery, context: DeliveryContext) -> dict[str, Any]:
    return await export_and_store(delivery, context)
