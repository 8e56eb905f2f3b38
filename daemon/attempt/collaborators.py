"""What the worker and its attempts work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from daemon.fitness import Fitness
from daemon.host.inspect import Host
from daemon.queue.job_store import JobStore
from daemon.queue.lease import LeaseKeeper
from daemon.report.courier import CallbackCourier
from daemon.settings import Settings
from daemon.storage.interface import Storage
from daemon.storage.upload_log import UploadLog
from daemon.trainer.pool import Trainers
from daemon.troubles import Troubles


@dataclass(frozen=True)
class Collaborators:
    """Built once for a program: by daemon.service, or by daemon.serverless."""

    settings: Settings
    host: Host
    store: JobStore
    uploads: UploadLog
    leases: LeaseKeeper
    storage: Storage
    courier: CallbackCourier
    trainers: Trainers
    fitness: Fitness
    platform_price: Callable[[], float | None] = lambda: None
    troubles: Troubles = field(default_factory=Troubles)
