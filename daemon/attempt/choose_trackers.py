"""Chooses a job's experiment trackers, and the one secret that its trainer may hold for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec

from daemon.errors import JobFailed
from daemon.settings import Settings
from training.events import ErrorCode
from training.spec import Hyperparameters, Tracker


@dataclass(frozen=True)
class Tracking:
    """The trackers of one job. `environment` is for its trainer's process alone, and empty if they need no secret."""

    trackers: tuple[Tracker, ...]
    environment: dict[str, str] = field(default_factory=dict, repr=False)


def choose_trackers(wanted: Hyperparameters, settings: Settings) -> Tracking:
    """Returns what the job asks for, else the host's default.

    Raises JobFailed(invalid_spec) before anything is loaded when this host cannot do it."""
    trackers = settings.trackers if wanted.trackers is None else wanted.trackers
    if "wandb" not in trackers:
        return Tracking(trackers)
    if find_spec("wandb") is None or settings.wandb_api_key is None:
        raise JobFailed(
            ErrorCode.INVALID_SPEC,
            "The job asks for the tracker wandb, which this service does not offer.",
            "Leave wandb out of hyperparameters.trackers, or ask the operator to install `brightrun-trainer[wandb]` "
            "and set WANDB_API_KEY.",
        )
    environment = {
        "WANDB_API_KEY": settings.wandb_api_key.get_secret_value(),
        "WANDB_PROJECT": settings.wandb_project,
        "WANDB_ENTITY": settings.wandb_entity,
        "WANDB_BASE_URL": settings.wandb_base_url,
    }
    return Tracking(trackers, {name: value for name, value in environment.items() if value is not None})
