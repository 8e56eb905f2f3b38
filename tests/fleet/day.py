"""A day of a fleet, minute by minute on a clock of its own: real Postgres, real HTTP to a RunPod on loopback.

The app inserts jobs as an app has them: single ones in the night, a burst in the morning, one far too large. Pods take
six minutes to boot and end themselves after ten idle minutes, as the guide sets them up; on them run daemons reduced
to their statements. What goes wrong goes wrong at a set time: an outage of the API, cards sold out, a pod whose image
never comes up, a host that dies with its job, a pod that forgets to end itself, a lost answer.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from daemon.database.connection import Database
from daemon.pod.runpod_api import RunPodError
from daemon.queue.job import Lease
from daemon.queue.outcome import Completed
from daemon.queue.rows import Limits
from daemon.queue.sql_job_store import SqlJobStore
from tests.doubles.runpod_api import PodRow
from tests.fleet.yard import H100, Yard

DAY_MINUTES = 24 * 60
BOOT_MINUTES = 6
IDLE_MINUTES = 10
# Minute of the day -> how long each of the jobs inserted then runs.
ARRIVALS: dict[int, tuple[int, ...]] = {
    95: (40,),
    8 * 60: (50, 50, 35, 60, 45, 30, 55),
    9 * 60 + 30: (120,),
    12 * 60: (25, 25),
    14 * 60 + 10: (20,),
    16 * 60: (90,),
    20 * 60: (15,),
    22 * 60 + 30: (30,),
}
TOO_LARGE = 10 * 60
SOLD_OUT = range(12 * 60 - 5, 12 * 60 + 35)
API_AWAY = range(14 * 60 + 12, 14 * 60 + 40)
NEVER_BOOTS = 16 * 60
HOST_DIES = 9 * 60 + 65
FORGETS_TO_END = 20 * 60
ANSWER_LOST = 22 * 60 + 30


@dataclass
class Daemon:
    """What a daemon does to the database, a minute at a time."""

    pod: PodRow
    worker: UUID
    job: UUID | None = None
    lease: Lease | None = None
    done_at: int = 0
    idle_minutes: int = 0


@dataclass
class Day:
    """Run it, then read what it cost and what it decided."""

    yard: Yard
    durations: dict[UUID, int] = field(default_factory=dict)
    daemons: list[Daemon] = field(default_factory=list)
    booting: dict[str, int] = field(default_factory=dict)
    waits: list[int] = field(default_factory=list)
    arrived: dict[UUID, int] = field(default_factory=dict)
    pod_minutes: int = 0
    busy_minutes: int = 0
    most_pods: int = 0
    cost: float = 0.0
    started_at: datetime | None = None

    async def run(self) -> None:
        yard = self.yard
        self.started_at = yard.now
        async with (
            yard.fleet() as fleet,
            Database(yard.database.dsn, application_name="the daemons of the day") as database,
        ):
            store = SqlJobStore(database)
            for minute in range(DAY_MINUTES):
                self._insert_what_arrives(minute)
                self._let_go_wrong(minute)
                await self._live(minute, store)
                # As `run` has it: nothing is decided without a sight of the pods.
                with suppress(RunPodError):
                    await fleet.look()
                # Host that died: whoever looks reaps; here it is the fleet's second task.
                await store.reap_expired_leases()
                self._pay()
                yard.after(minutes=1)

    def at(self, moment: datetime) -> str:
        """A decision's time on the clock of the day."""
        assert self.started_at is not None
        minutes = round((moment - self.started_at).total_seconds() / 60)
        return f"{minutes // 60:02d}:{minutes % 60:02d}"

    def _insert_what_arrives(self, minute: int) -> None:
        for duration in ARRIVALS.get(minute, ()):
            job = self._insert()
            self.durations[job] = duration
            self.arrived[job] = minute
        if minute == TOO_LARGE:
            self._insert(gpu_config={"num_gpus": 8, "gpu_memory_gb": 80})

    def _insert(self, **columns: Any) -> UUID:
        job = self.yard.job(**columns)
        # The guard stamps the database's clock; the day's own is put in its place, past the guard.
        run = self.yard.database.run
        run("SET session_replication_role = replica")
        run("UPDATE training_jobs SET queued_at = %s - interval '30 seconds' WHERE id = %s", (self.yard.now, job))
        run("RESET session_replication_role")
        return job

    def _let_go_wrong(self, minute: int) -> None:
        runpod = self.yard.runpod
        runpod.sold_out = {H100} if minute in SOLD_OUT else set()
        runpod.failures.clear()
        if minute in API_AWAY:
            runpod.fail(503, times=1000)
        if minute == ANSWER_LOST:
            runpod.fail(0, cut=True, after=True, only="POST")
        if minute == HOST_DIES:
            victim = next(daemon for daemon in self.daemons if daemon.job is not None)
            victim.pod.status = "TERMINATED"
            self.daemons.remove(victim)
            # The lease runs out by the database's clock, which does not know that this is a day.
            self.yard.database.run(
                "UPDATE training_leases SET heartbeat_at = now() - interval '1.001 seconds', "
                "expires_at = now() - interval '1 second' WHERE job_id = %s",
                (victim.job,),
            )

    async def _live(self, minute: int, store: SqlJobStore) -> None:
        for pod in self.yard.pods:
            if pod.status == "PROVISIONING":
                age = self.booting[pod.id] = self.booting.get(pod.id, 0) + 1
                broken = NEVER_BOOTS <= minute - age + 1 < NEVER_BOOTS + 5
                if age > BOOT_MINUTES and not broken:
                    self.daemons.append(Daemon(pod, self.yard.boot(pod)))
        for daemon in list(self.daemons):
            if daemon.pod.status != "RUNNING":
                self.daemons.remove(daemon)
                continue
            await self._work(daemon, minute, store)
            self.yard.touch(daemon.worker, busy=int(daemon.job is not None))
            if daemon.idle_minutes > IDLE_MINUTES and not FORGETS_TO_END <= minute < FORGETS_TO_END + 120:
                self.yard.touch(daemon.worker, state="gone")
                daemon.pod.status = "TERMINATED"
                self.daemons.remove(daemon)

    async def _work(self, daemon: Daemon, minute: int, store: SqlJobStore) -> None:
        if daemon.lease is not None and minute >= daemon.done_at:
            adapter = Completed(f"lora-models/adapters/{daemon.job}.tar.gz", "0" * 64, 1)
            await store.complete_job(daemon.lease, adapter, cost=1.0)
            daemon.job = daemon.lease = None
        if daemon.job is None and not self.yard.wants_drain(daemon.worker):
            host = Limits(free_gpus=1, gpu_memory_gb=79.6, gpu_type=H100)
            claim = await store.claim_job(daemon.worker, host, lease_seconds=1e6)
            if claim.job is not None:
                daemon.job, daemon.lease, daemon.idle_minutes = claim.job.id, claim.job.lease, 0
                daemon.done_at = minute + self.durations[claim.job.id]
                self.waits.append(minute - self.arrived[claim.job.id])
                return
        daemon.idle_minutes = 0 if daemon.job is not None else daemon.idle_minutes + 1

    def _pay(self) -> None:
        pods = self.yard.pods
        self.pod_minutes += len(pods)
        self.busy_minutes += sum(daemon.job is not None for daemon in self.daemons)
        self.most_pods = max(self.most_pods, len(pods))
        self.cost += sum(pod.cost for pod in pods) / 60


def table(day: Day) -> str:
    """The decisions table of the day, and what it came to."""
    lines = [f"{'time':<6}{'decision':<12}{'pod':<7}{'reason'}"]
    for line in day.yard.story():
        lines.append(f"{day.at(line['at']):<6}{line['decision']:<12}{line['pod'] or '':<7}{_short(line['reason'])}")
    states = day.yard.database.run("SELECT status, count(*) AS jobs FROM training_jobs GROUP BY 1 ORDER BY 1")
    ended = ", ".join(f"{row['jobs']} {row['status']}" for row in states)
    always_on = 3.0 * 24 * day.yard.settings.fleet_max_pods
    lines += [
        "",
        f"jobs: {ended}; waited {min(day.waits)} to {max(day.waits)} minutes",
        f"pods: at most {day.most_pods} at once, {day.pod_minutes / 60:.1f} hours, {day.busy_minutes / 60:.1f} at work",
        f"cost: {day.cost:.2f} US dollars; the same pods all day: {always_on:.2f}",
    ]
    return "\n".join(lines)


def _short(reason: str) -> str:
    """Without the ids, which say nothing on a page."""
    words = [word for word in reason.split() if not _is_id(word.strip("(),:;"))]
    return " ".join(words).replace("(job and", "and")[:110]


def _is_id(word: str) -> bool:
    try:
        return bool(UUID(word))
    except ValueError:
        return False
