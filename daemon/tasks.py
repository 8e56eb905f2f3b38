"""Waits for an event with a time limit, without losing a cancellation."""

from __future__ import annotations

import asyncio


async def wait_at_most(event: asyncio.Event, seconds: float) -> bool:
    """Returns True when the event is set, False when the time is over."""
    try:
        # Not wait_for: before Python 3.12 it swallows a cancellation that arrives together with the event.
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
