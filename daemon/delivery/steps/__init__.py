"""What is done for each kind of delivery: one file a kind, each with `deliver` and `lacks`.

`deliver(delivery, context)` does it and returns the result, which the row keeps and the job's owner reads. It raises
JobFailed for what cannot be done, JobDelayed for what may work later, HostFault or StorageAway where the delivery is
not at fault. Done twice it must leave the same as done once: a host may die before it has written the result.
`lacks(settings)` says why this host cannot do the kind, or None.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from daemon.delivery.context import DeliveryContext
from daemon.delivery.delivery import Delivery
from daemon.delivery.steps import endpoint, gguf, hub, merged, transformers4
from daemon.queue.outcome import DeliveryKind
from daemon.settings import Settings


@dataclass(frozen=True)
class Step:
    deliver: Callable[[Delivery, DeliveryContext], Awaitable[dict[str, Any]]]
    lacks: Callable[[Settings], str | None]


STEPS: Mapping[DeliveryKind, Step] = {
    "merged": Step(merged.deliver, merged.lacks),
    "gguf": Step(gguf.deliver, gguf.lacks),
    "transformers4": Step(transformers4.deliver, transformers4.lacks),
    "hub": Step(hub.deliver, hub.lacks),
    "endpoint": Step(endpoint.deliver, endpoint.lacks),
}


def kinds_of_host(settings: Settings, steps: Mapping[DeliveryKind, Step] = STEPS) -> tuple[DeliveryKind, ...]:
    """Returns the kinds that this host does: all that it can, or those of them that TRAINER_DELIVERIES names."""
    wanted = settings.deliveries if settings.deliveries is not None else tuple(steps)
    return tuple(kind for kind, step in steps.items() if kind in wanted and step.lacks(settings) is None)
