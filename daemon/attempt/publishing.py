"""Stores a finished adapter with the patience of an ending: what took hours to train is not given up after minutes."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from daemon.attempt.collaborators import Collaborators
from daemon.attempt.finished_adapter import FinishedAdapter
from daemon.attempt.work_folder import WorkFolder
from daemon.errors import HostFault, JobDelayed
from daemon.host.inspect import installed_versions
from daemon.queue.job import ClaimedJob
from daemon.queue.outcome import Completed
from daemon.report.reporter import Reporter
from daemon.storage.publish import publish_adapter
from daemon.storage.upload_log import note_adapter
from daemon.trainer.verdict import Trained
from training.spec import JobSpec

log = structlog.get_logger()

# The storage itself waits for seconds up to minutes before it gives up: these come on top of that.
FIRST_WAIT_SECONDS = 5.0
LONGEST_WAIT_SECONDS = 300.0


class Publishing:
    """Stores one attempt's adapter. `begun`: objects of it may be in storage."""

    def __init__(self, collaborators: Collaborators, job: ClaimedJob) -> None:
        self._with = collaborators
        self._job = job
        self.begun = False

    async def publish(self, adapter: FinishedAdapter, workspace: WorkFolder, reporter: Reporter) -> Completed:
        """Records what will be stored, then stores it, so that the objects can be found whatever happens in between.

        While the storage is away it tries again, for TRAINER_UPLOAD_HOURS; the job's own limits and a stop request end
        that earlier. A refusal, and a fault of this host, end it at once: the adapter is kept for the next attempt."""
        job, storage = self._job, self._with.storage
        await note_adapter(self._with.uploads, job, storage.location)
        self.begun = True
        clock = asyncio.get_running_loop().time
        give_up_at, wait = clock() + self._with.settings.upload_hours * 3600.0, FIRST_WAIT_SECONDS
        while True:
            try:
                return await publish_adapter(
                    storage, adapter.folder, job.id, job.lease_epoch, adapter.facts, workspace.attempt_dir
                )
            except HostFault:
                raise
            except JobDelayed as error:
                left = give_up_at - clock()
                if left <= 0:
                    raise
                log.warning("upload_delayed", error=error.for_the_operator)
                if wait == FIRST_WAIT_SECONDS:
                    reporter.tell(
                        "upload_delayed",
                        f"The adapter is finished but cannot be stored now; it is tried again. The error: {error}",
                    )
            await asyncio.sleep(min(wait, left))
            wait = min(2.0 * wait, LONGEST_WAIT_SECONDS)


def manifest_facts(spec: JobSpec, spec_sha256: str, reporter: Reporter, trained: Trained) -> dict[str, Any]:
    """Returns facts for serving the adapter, stored beside it: what it was made from, and how training went.

    They hold nothing that the job's owner must not read."""
    facts = {
        "job_id": spec.job_id,
        "spec_sha256": spec_sha256,
        "base_model": spec.base_model,
        "base_model_revision": spec.model_revision,
        "hyperparameters": spec.hyperparameters.model_dump(mode="json"),
        "trained_with": reporter.trained_with,
        "serving": trained.serving,
        "summary": trained.summary,
        "versions": installed_versions(),
    }
    return dict(reporter.redaction.value(facts))
