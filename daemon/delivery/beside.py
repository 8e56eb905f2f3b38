"""What the worker knows of the deliveries of its host: how to start, pause and end what works beside the jobs."""

from __future__ import annotations

import asyncio


class Deliveries:
    """None: this host does no deliveries. daemon.delivery.runner does them."""

    def __init__(self) -> None:
        # Set once nothing is under way and nothing more will be claimed.
        self.ended = asyncio.Event()
        # When the last delivery ended here, by the monotonic clock.
        self.worked_at = 0.0

    @property
    def is_working(self) -> bool:
        return False

    async def run(self) -> None:
        """A chore: does what is due until `drain`."""
        self.ended.set()

    def rested(self, *, idle: bool) -> None:
        """The queue was just looked at. `idle`: no job runs or waits here, so that a CPU host may begin a delivery."""

    def drain(self) -> None:
        """Claims nothing more; the current delivery goes on to its end."""

    def shut_down(self) -> None:
        """Claims nothing more, and gives the current delivery back."""

    async def pause(self) -> None:
        """Claims nothing until `resume`; returns when no claim is under way."""

    def resume(self) -> None:
        """Claims again."""
