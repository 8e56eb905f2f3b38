"""Decides which pods to start and to end, as plain functions of the observed state.

The fleet starts pods, up to a limit, when due jobs wait that no host has room for. It ends a pod that never reports in,
falls silent, has stopped itself, or is idle for too long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from daemon.fleet.pod_plan import GpuKind
from daemon.host.inspect import MEMORY_TOLERANCE
from daemon.pod.runpod_api import STOPPED, TERMINATED, Pod

# A daemon touches its row every ten seconds.
ALIVE_SECONDS = 120.0
# After an outage of the database all rows are old: until each host has touched its row, such hosts count as alive.
ALIVE_AFTER_OUTAGE_SECONDS = 3600.0
# How long a new pod may be missing from RunPod's list after we asked for it.
CREATE_GRACE_SECONDS = 120.0
# A drained daemon leaves immediately; one that has not left by then does not respond.
DRAIN_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class FleetLimits:
    """The TRAINER_FLEET_* settings, times in seconds."""

    max_pods: int
    patience_seconds: float
    jobs_per_pod: int
    report_seconds: float
    overstay_seconds: float
    user_cap: int | None
    models: tuple[str, ...]


@dataclass(frozen=True)
class WaitingJob:
    id: UUID
    user_id: UUID
    need_gpus: int
    need_gpu_memory_gb: float | None
    need_gpu_type: str | None
    base_model: str | None
    queued_at: datetime
    running: int = 0


@dataclass(frozen=True)
class WorkerSeen:
    """A daemon's row, the leases that it holds and the deliveries that it works on, which take no slot."""

    id: UUID
    pod: str | None
    device: str
    gpu_count: int
    gpu_memory_gb: float | None
    gpu_type: str | None
    models: Sequence[str] | None
    slots: int
    busy: int
    state: str
    last_seen_at: datetime
    leases: int
    live_leases: int = 0
    deliveries: int = 0

    @property
    def has_work(self) -> bool:
        return self.busy > 0 or self.leases > 0 or self.deliveries > 0


@dataclass(frozen=True)
class PodRow:
    """A pod that the fleet asked for. `pod` is RunPod's id, None until it is known."""

    id: UUID
    gpu_type: str
    gpu_count: int
    pod: str | None
    asked_at: datetime
    reported_at: datetime | None
    idle_since: datetime | None
    doomed_at: datetime | None
    doom: str | None
    ended_at: datetime | None


@dataclass(frozen=True)
class View:
    """Everything that one look has read. `listed` are RunPod's pods by the id of our row."""

    now: datetime
    jobs: Sequence[WaitingJob]
    workers: Sequence[WorkerSeen]
    pods: Sequence[PodRow]
    listed: dict[UUID, Pod]
    # False for a while after we reconnect: a silent host may only not have reconnected yet.
    may_judge_silence: bool = True
    # Row security hides rows from us: we cannot tell whether a host is silent or idle.
    is_blind: bool = False
    # Live leases of hosts without a row. Their pods may look as if they never reported in.
    unplaced_leases: int = 0

    @property
    def alive_seconds(self) -> float:
        return ALIVE_SECONDS if self.may_judge_silence else ALIVE_AFTER_OUTAGE_SECONDS

    def age(self, since: datetime) -> float:
        return (self.now - since).total_seconds()

    def works(self, row: PodRow) -> bool:
        """Whether any daemon on this pod, the current or an earlier one, keeps a lease or a delivery alive."""
        return any(
            worker.live_leases > 0 or worker.deliveries > 0
            for worker in self.workers
            if worker.pod is not None and worker.pod == row.pod
        )

    def worker_of(self, row: PodRow) -> WorkerSeen | None:
        """The most recently seen daemon on this pod."""
        found = [worker for worker in self.workers if worker.pod is not None and worker.pod == row.pod]
        return max(found, key=lambda worker: worker.last_seen_at, default=None)


@dataclass(frozen=True)
class Doom:
    """Why to end a pod: a short word that is stored, and a reason for people."""

    row: PodRow
    word: str
    reason: str


def judge_pod(row: PodRow, view: View, limits: FleetLimits) -> Doom | None:
    """Decides whether to end this pod, which RunPod still lists."""
    listed = view.listed.get(row.id)
    if row.doomed_at is not None or listed is None:
        return None
    if listed.status in STOPPED:
        return Doom(row, "stopped", f"it is {listed.status}: it stopped itself, or failed; its disk costs")
    worker = view.worker_of(row)
    if worker is None:
        age = view.age(row.asked_at)
        if view.may_judge_silence and age > limits.report_seconds and not view.unplaced_leases:
            return Doom(row, "never_reported", f"no daemon reported in for {_minutes(age)} min")
        return None
    if view.works(row):
        # Its row may still be old: then the code that touches the row has failed, not the host.
        return None
    silent = view.age(worker.last_seen_at)
    if worker.state == "gone":
        if silent > DRAIN_GRACE_SECONDS:
            return Doom(row, "left", "its daemon has left and the pod is still there")
        return None
    if silent > limits.report_seconds:
        return (
            Doom(row, "silent", f"its daemon was last seen {_minutes(silent)} min ago")
            if (view.may_judge_silence)
            else None
        )
    if worker.has_work or row.idle_since is None:
        return None
    idle = view.age(row.idle_since)
    if worker.state == "out_of_service" and idle > limits.report_seconds:
        return Doom(row, "unfit", f"its host is out of service, and has had no job for {_minutes(idle)} min")
    if idle > limits.overstay_seconds:
        return Doom(row, "overstayed", f"idle for {_minutes(idle)} min and did not end itself")
    return None


def may_terminate(row: PodRow, view: View) -> bool:
    """Whether a doomed pod can be terminated now. One that still has a job drains: its daemon claims nothing more."""
    assert row.doomed_at is not None
    worker = view.worker_of(row)
    if view.works(row) and row.doom != "stopped":
        return False
    if row.doom == "never_reported" and worker is None and view.unplaced_leases:
        return False
    if row.doom in ("stopped", "never_reported", "left", "silent") or worker is None or worker.state == "gone":
        return True
    return not worker.has_work and view.age(row.doomed_at) > DRAIN_GRACE_SECONDS


@dataclass
class _Room:
    """Room for jobs on one host: a live one, one that is starting, or one that could be started."""

    gpu_count: int | None
    gpu_memory_gb: float | None
    gpu_type: str | None
    models: Collection[str] | None
    slots: int

    def fits(self, job: WaitingJob) -> bool:
        """The condition of sql/queries/queue/_candidates.sql, for hosts that may not exist yet."""
        return (
            (self.gpu_count is None or job.need_gpus <= self.gpu_count)
            and (
                self.gpu_memory_gb is None
                or job.need_gpu_memory_gb is None
                or job.need_gpu_memory_gb * MEMORY_TOLERANCE <= self.gpu_memory_gb
            )
            and (
                self.gpu_type is None or job.need_gpu_type is None or job.need_gpu_type.lower() in self.gpu_type.lower()
            )
            and (self.models is None or job.base_model is None or job.base_model in self.models)
        )


@dataclass
class Demand:
    """What one look asks for: a pod per job of `starts`. `unservable` jobs fit no GPU type, `over` are over a limit."""

    starts: list[tuple[GpuKind, WaitingJob, int]] = field(default_factory=list)
    unservable: list[WaitingJob] = field(default_factory=list)
    over: list[WaitingJob] = field(default_factory=list)
    patient: bool = False


def weigh(view: View, kinds: Sequence[GpuKind], cooling: Collection[str], limits: FleetLimits) -> Demand:
    """Assigns every waiting job to a live host, a pod that is starting, or a pod to be started."""
    by_id = {kind.id: kind for kind in kinds}
    open_rows = [row for row in view.pods if row.ended_at is None]
    of_kind = Counter(row.gpu_type for row in open_rows)
    rooms = [*_living(view, limits), *_starting(open_rows, by_id, limits)]
    demand = Demand()
    served: Counter[UUID] = Counter()
    for job in view.jobs:
        if limits.user_cap is not None and job.running + served[job.user_id] >= limits.user_cap:
            continue
        room = next((room for room in rooms if room.slots > 0 and room.fits(job)), None)
        if room is None:
            kind = _choose(job, kinds, cooling, of_kind, limits)
            if kind is None:
                fits = any(_room(kind, limits).fits(job) for kind in kinds)
                (demand.over if fits else demand.unservable).append(job)
                continue
            if view.age(job.queued_at) < limits.patience_seconds:
                demand.patient = True
                continue
            if len(open_rows) + len(demand.starts) >= limits.max_pods:
                demand.over.append(job)
                continue
            of_kind[kind.id] += 1
            demand.starts.append((kind, job, len(view.jobs)))
            room = _room(kind, limits)
            rooms.append(room)
        room.slots -= 1
        served[job.user_id] += 1
    return demand


def _choose(
    job: WaitingJob, kinds: Iterable[GpuKind], cooling: Collection[str], of_kind: Counter[str], limits: FleetLimits
) -> GpuKind | None:
    """The first GPU type in the plan's order that fits, is below its own limit and is not cooling down."""
    for kind in kinds:
        below = kind.max_pods is None or of_kind[kind.id] < kind.max_pods
        if below and kind.id not in cooling and _room(kind, limits).fits(job):
            return kind
    return None


def _living(view: View, limits: FleetLimits) -> list[_Room]:
    # A host is dead if RunPod no longer lists its pod, though its row still counts as alive for two minutes.
    lost = {row.pod for row in view.pods if row.pod is not None and (row.id not in view.listed or row.doomed_at)}
    rooms = []
    for worker in view.workers:
        alive = worker.state in ("idle", "busy") and view.age(worker.last_seen_at) < view.alive_seconds
        if alive and (worker.pod is None or worker.pod not in lost):
            slots = worker.slots * limits.jobs_per_pod - max(worker.busy, worker.leases)
            gpus = None if worker.device == "cpu" else worker.gpu_count
            rooms.append(_Room(gpus, worker.gpu_memory_gb, worker.gpu_type, worker.models, slots))
    return rooms


def _starting(rows: Iterable[PodRow], kinds: dict[str, GpuKind], limits: FleetLimits) -> list[_Room]:
    return [
        _room(kinds.get(row.gpu_type) or GpuKind(id=row.gpu_type, count=row.gpu_count), limits)
        for row in rows
        if row.reported_at is None and row.doomed_at is None
    ]


def _room(kind: GpuKind, limits: FleetLimits) -> _Room:
    # One job per GPU, like a daemon without TRAINER_SLOTS.
    return _Room(kind.count, kind.memory_gb, kind.id, limits.models or None, kind.count * limits.jobs_per_pod)


def is_gone(row: PodRow, view: View) -> bool:
    """Whether RunPod no longer lists the pod. False while a new pod may not be listed yet."""
    listed = view.listed.get(row.id)
    if listed is not None:
        return listed.status in TERMINATED
    return view.age(row.asked_at) > CREATE_GRACE_SECONDS


def _minutes(seconds: float) -> int:
    return round(seconds / 60)
