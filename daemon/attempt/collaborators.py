"""The objects that the worker and its attempts work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from daemon.database.retry import retry_until_database_is_back
from daemon.delivery.beside import Deliveries
from daemon.fitness import Fitness
from daemon.host.inspect import Host
from daemon.queue.job_store import JobStore
from daemon.queue.lease import LeaseKeeper
from daemon.redaction import Redaction
from daemon.report.courier import CallbackCourier
from daemon.settings import Settings
from daemon.storage.interface import Storage
from daemon.storage.upload_log import UploadLog
from daemon.trainer.pool import TrainerPool
from daemon.troubles import Troubles


@dataclass(frozen=True)
class Collaborators:
    """Built once per program (`of`), by daemon.service or by daemon.serverless."""

    settings: Settings
    host: Host
    store: JobStore
    uploads: UploadLog
    leases: LeaseKeeper
    storage: Storage
    courier: CallbackCourier
    trainers: TrainerPool
    fitness: Fitness
    platform_price: Callable[[], float | None]
    troubles: Troubles
    redaction: Redaction
    deliveries: Deliveries = field(default_factory=Deliveries)

    async def owns_file(self, user_id: UUID, path: str) -> bool:
        """Whether a path in the bucket training-files is this user's. Waits while the database is away."""
        return await retry_until_database_is_back(
            lambda: self.store.owns_training_file(user_id, path), "training_file_not_read"
        )

    @classmethod
    def of(
        cls,
        settings: Settings,
        host: Host,
        trainer_command: tuple[str, ...],
        troubles: Troubles,
        *,
        store: JobStore,
        heartbeat: JobStore,
        uploads: UploadLog,
        storage: Storage,
        courier: CallbackCourier,
        platform_price: Callable[[], float | None] = lambda: None,
        deliveries: Deliveries | None = None,
    ) -> Collaborators:
        """With or without a database: `store` and `uploads` keep the jobs, `heartbeat` renews their leases.

        `deliveries` work beside the jobs; without a database there are none."""
        return cls(
            settings=settings,
            host=host,
            store=store,
            uploads=uploads,
            leases=LeaseKeeper(
                heartbeat,
                lease_seconds=settings.lease_seconds,
                on_partition=settings.on_partition,
                troubles=troubles,
            ),
            storage=storage,
            courier=courier,
            trainers=TrainerPool(settings, host, trainer_command),
            fitness=Fitness(settings, host, trainer_command, troubles, storage),
            platform_price=platform_price,
            troubles=troubles,
            redaction=Redaction.of(settings, (host.hostname, host.pod_id)),
            deliveries=deliveries or Deliveries(),
        )
