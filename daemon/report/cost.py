"""What an attempt costs: hours times GPUs times the price of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True)
class CostMeter:
    """US dollars of one job, over all its attempts. `price` is per GPU and hour; None if it is unknown."""

    price: float | None
    num_gpus: int
    already_spent: float

    def cost(self, attempt_seconds: float) -> float | None:
        if self.price is None:
            return self.already_spent or None
        return self.already_spent + self.price * self.num_gpus * attempt_seconds / SECONDS_AN_HOUR


def price_per_gpu_hour(platform: float | None, operator: float | None, asked: float | None) -> float | None:
    """Returns the platform's price, else the operator's setting, else the price in gpu_config, which a tenant wrote."""
    return next((price for price in (platform, operator, asked) if price is not None), None)
