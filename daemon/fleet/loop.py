"""The fleet loop: starts pods when due jobs wait that no host can take, and ends pods that are not useful.

It runs on any small host and keeps no state: the queue says what is needed, RunPod's list says what exists, and each
decision is in a table before it is carried out. So it may die at any moment, and two may run at once. It also cleans up
for dead hosts: it reaps their leases and delivers their callbacks.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import datetime, timedelta
from uuid import UUID

import structlog

from daemon.chores import Chores
from daemon.database.connection import Database
from daemon.database.listener import Listener
from daemon.errors import DatabaseAway, HostUnfit, StatementRefused
from daemon.fleet.pod_plan import NAME_PREFIX, FleetPlan, GpuKind, read_plan
from daemon.fleet.rules import (
    ALIVE_AFTER_OUTAGE_SECONDS,
    FleetLimits,
    PodRow,
    View,
    WaitingJob,
    is_gone,
    judge_pod,
    may_terminate,
    weigh,
)
from daemon.fleet.store import FleetStore
from daemon.logs import configure_logs_by
from daemon.pod.runpod_api import ApiFault, Key, Pod, RunPod, RunPodError
from daemon.queue.reaper import reap_forever
from daemon.queue.row_visibility import RowVisibility, is_blind
from daemon.queue.sql_job_store import SqlJobStore
from daemon.report.courier import CallbackCourier
from daemon.report.outbox import SqlOutbox
from daemon.settings import Settings
from daemon.troubles import Troubles

log = structlog.get_logger()

MAX_COOL_SECONDS = 900.0
# After we reconnect: longer than every daemon needs to reconnect and touch its row.
SETTLE_SECONDS = 120.0
# Pods come and go by the minute.
AWAY_SECONDS = 5.0
MAX_WAIT_SECONDS = 300.0


def run_fleet(settings: Settings) -> None:
    """Runs the fleet loop until a signal. Raises HostUnfit if the settings are not enough for it."""
    asyncio.run(serve_fleet(settings))


async def serve_fleet(settings: Settings) -> None:
    plan, keys = read_plan(settings.fleet_pod), _keys(settings)
    configure_logs_by(settings, plan.secrets)
    dsn = settings.database_url.get_secret_value()
    async with AsyncExitStack() as stack:
        # Two connections: one holds the lock and decides, one cleans up for dead hosts.
        deciding = await stack.enter_async_context(Database(dsn, application_name="brightrun-trainer fleet"))
        helping = await stack.enter_async_context(Database(dsn, application_name="brightrun-trainer fleet outbox"))
        runpod = await stack.enter_async_context(RunPod(keys, api=settings.runpod_api))
        troubles = Troubles()
        store, visibility = SqlJobStore(helping, troubles), RowVisibility(helping)
        outbox, courier = SqlOutbox(helping, troubles), CallbackCourier(settings)
        fleet = Fleet(settings, plan, FleetStore(deciding), store, runpod, visibility=visibility)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, fleet.leave)
        listener = Listener(dsn, wake=fleet.wake, on_cancel=lambda _job_id: None)
        log.info("fleet_started", max_pods=settings.fleet_max_pods, gpus=[kind.id for kind in plan.gpus])
        if not plan.ends_itself:
            log.warning(
                "fleet_pods_idle", advice="set TRAINER_IDLE_MINUTES in the pod's env, so that pods end themselves"
            )
        async with Chores(troubles) as chores:
            chores.start("listener", listener.run)
            chores.start("callbacks", lambda: courier.run(outbox))
            chores.start("reaper", lambda: reap_forever(store, visibility, settings.lease_seconds))
            await fleet.run()
        log.info("fleet_ended")


class Fleet:
    """`look` reads everything once and acts on it; `run` does so again and again."""

    def __init__(
        self,
        settings: Settings,
        plan: FleetPlan,
        fleet: FleetStore,
        store: SqlJobStore,
        runpod: RunPod,
        *,
        visibility: RowVisibility,
        clock: Callable[[], datetime] | None = None,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._settings = settings
        self._plan = plan
        self._fleet = fleet
        self._store = store
        self._visibility = visibility
        self._runpod = runpod
        self._clock = clock
        self._settle_seconds = settle_seconds
        self._limits = FleetLimits(
            max_pods=settings.fleet_max_pods,
            patience_seconds=settings.fleet_patience_seconds,
            jobs_per_pod=settings.fleet_jobs_per_pod,
            report_seconds=settings.fleet_report_minutes * 60,
            overstay_seconds=settings.fleet_overstay_minutes * 60,
            user_cap=settings.user_cap,
            models=settings.allowed_models,
        )
        self._wake = asyncio.Event()
        self._leaving = False
        self._away_at = 0.0
        # Decisions that are recorded and still hold: record changes only, not every look.
        self._said: set[tuple[str, str]] = set()

    def wake(self) -> None:
        self._wake.set()

    def leave(self) -> None:
        """Ends the loop after the current look. The pods keep running and end themselves."""
        self._leaving = True
        self._wake.set()

    async def run(self) -> None:
        while not self._leaving:
            # Clear before looking, so that a wake-up during the look is not lost.
            self._wake.clear()
            seconds = await self._look_safely()
            if not self._leaving:
                try:
                    await asyncio.wait_for(self._wake.wait(), seconds)
                except TimeoutError:
                    continue

    async def _look_safely(self) -> float:
        """Looks once; if the database or RunPod is away, tries again later. Returns seconds until the next look."""
        try:
            return await self.look()
        except DatabaseAway as error:
            log.warning("fleet_database_away", error=str(error))
            # The daemons lacked the same table or right: their rows are as old as after an outage.
            self._away_at = time.monotonic()
            return AWAY_SECONDS
        except StatementRefused as error:
            log.error("fleet_statement_refused", error=str(error))
            self._store.troubles.begin("fleet", f"the database refuses what the fleet writes: {error}")
            return AWAY_SECONDS
        except RunPodError as error:
            # Without RunPod's list we cannot decide that a pod is missing or needed.
            log.warning("fleet_runpod_away", fault=error.fault, error=str(error))
            return min(max(error.wait_seconds, self._settings.fleet_poll_seconds), MAX_WAIT_SECONDS)

    async def look(self) -> float:
        """Reads the state, corrects rows, ends and starts pods. Returns seconds until the next look."""
        ours, now = await self._fleet.take_turn()
        if not ours:
            log.debug("fleet_standby", reason="another fleet loop has the turn")
            return self._settings.fleet_poll_seconds
        try:
            seconds = await self._decide(self._clock() if self._clock else now)
            self._fleet.database.proven = self._store.database.proven = True
            return seconds
        finally:
            await self._end_turn()

    async def _end_turn(self) -> None:
        try:
            await self._fleet.end_turn()
        except (DatabaseAway, StatementRefused) as error:
            # The lock was lost with the connection.
            log.debug("fleet_turn_lost", error=str(error))

    async def _decide(self, now: datetime) -> float:
        await self._store.promote_due_jobs()
        view = await self._see(now)
        for row in view.pods:
            try:
                if row.ended_at is None:
                    await self._put_in_order(row, view)
                elif (stray := view.listed.get(row.id)) is not None:
                    await self._end_stray(row, stray, view)
            except StatementRefused as error:
                # If the database refuses one fleet row, the other pods must still be ended.
                log.error("fleet_pod_refused_by_database", pod=row.pod, row=str(row.id), error=str(error))
        patient = False
        if view.jobs:
            # Read again: pods that have just ended free slots, and adopted ones are known now.
            patient = await self._start_what_is_needed(await self._see(now, view))
        else:
            self._said.clear()
        due_in = await self._store.next_due_in()
        waits = [self._settings.fleet_poll_seconds, self._limits.patience_seconds if patient else None, due_in]
        return max(min(wait for wait in waits if wait is not None), 0.05)

    # -- reading the state --------------------------------------------------------------------------------------

    async def _see(self, now: datetime, before: View | None = None) -> View:
        listed = before.listed if before else _by_row(await self._runpod.list_pods())
        pods = await self._fleet.pods(list(listed))
        pod_ids = [row.pod for row in pods if row.pod is not None and row.ended_at is None]
        workers = await self._fleet.workers(now - timedelta(seconds=ALIVE_AFTER_OUTAGE_SECONDS), pod_ids)
        blind = await is_blind(self._visibility)
        if blind:
            # A pod whose daemon's row is hidden looks as if it never reported in, also for a while afterwards.
            self._away_at = time.monotonic()
            log.error(
                "fleet_blind", advice="row security hides rows from training_daemon: see brightrun-trainer doctor"
            )
        connected_at = self._fleet.database.connected_at
        since = None if connected_at is None else max(connected_at, self._away_at)
        settled = since is not None and time.monotonic() - since >= self._settle_seconds
        jobs = await self._fleet.waiting_jobs(self._limits.user_cap)
        unplaced = await self._fleet.unplaced_leases()
        return View(now, jobs, workers, pods, listed, settled, blind, unplaced)

    # -- existing pods ------------------------------------------------------------------------------------------

    async def _put_in_order(self, row: PodRow, view: View) -> None:
        """Records what happened to a pod, and ends it if it is not useful."""
        now, listed = view.now, view.listed.get(row.id)
        if row.pod is None and listed is not None:
            # We, or another loop, died between creating the pod and recording it.
            await self._fleet.record_pod(now, row.id, listed, "adopt", "found by its name: the answer had been lost")
            log.warning("fleet_pod_adopted", pod=listed.id, row=str(row.id))
            return
        if is_gone(row, view):
            word = "never_came" if row.pod is None else row.doom or "gone"
            await self._end_row(row, view, word, "RunPod does not list it" if row.pod is None else "it is gone")
            return
        if view.is_blind:
            return
        worker = view.worker_of(row)
        if worker is not None and row.reported_at is None:
            waited = round(view.age(row.asked_at))
            await self._fleet.record_report(now, row.id, f"its daemon reported in {waited} s after it was asked for")
            log.info("fleet_pod_reported", pod=row.pod, seconds=waited)
        if worker is not None and (row.idle_since is None) != worker.has_work:
            await self._fleet.record_idle(row.id, None if worker.has_work else now)
        doom = judge_pod(row, view, self._limits)
        if doom is not None and await self._fleet.doom_pod(now, row.id, doom.word, doom.reason):
            log.warning("fleet_pod_doomed", pod=row.pod, doom=doom.word, reason=doom.reason)
            row = next(again for again in await self._fleet.pods([row.id]) if again.id == row.id)
        if row.doomed_at is not None and row.pod is not None and may_terminate(row, view):
            await self._terminate(row, view)

    async def _terminate(self, row: PodRow, view: View) -> None:
        try:
            await self._runpod.end_pod(str(row.pod), "terminate")
        except RunPodError as error:
            # The row stays: the next look tries again, and the pod keeps its slot while it may cost money.
            log.error("fleet_pod_not_ended", pod=row.pod, doom=row.doom, fault=error.fault, error=str(error))
            return
        del view.listed[row.id]
        await self._end_row(row, view, str(row.doom), "terminated")

    async def _end_row(self, row: PodRow, view: View, ending: str, reason: str) -> None:
        if await self._fleet.end_pod(view.now, row.id, ending, reason):
            log.info("fleet_pod_ended", pod=row.pod, gpu_type=row.gpu_type, ending=ending)

    async def _end_stray(self, row: PodRow, stray: Pod, view: View) -> None:
        """Ends a pod that was created after its row had ended: no job needs it."""
        try:
            await self._runpod.end_pod(stray.id, "terminate")
        except RunPodError as error:
            log.error("fleet_pod_not_ended", pod=stray.id, doom="stray", fault=error.fault, error=str(error))
            return
        del view.listed[row.id]
        log.warning("fleet_stray_ended", pod=stray.id, row=str(row.id))
        reason = "it was created after the fleet had given it up"
        await self._fleet.record_decision(view.now, "terminate", reason, pod_row=row.id, pod=stray.id)

    # -- new pods -----------------------------------------------------------------------------------------------

    async def _start_what_is_needed(self, view: View) -> bool:
        """Starts pods for jobs that no host can take. True if a job may need one a moment later."""
        cooling = await self._cooling(view.now)
        demand = weigh(view, self._plan.gpus, cooling, self._limits)
        while demand.starts:
            kind, job, waiting = demand.starts[0]
            if not await self._start(view, kind, job, waiting):
                break
            view = await self._see(view.now, view)
            cooling = await self._cooling(view.now)
            demand = weigh(view, self._plan.gpus, cooling, self._limits)
        await self._explain(view.now, "unservable", demand.unservable, _no_card_fits)
        limited = [] if demand.starts else demand.over
        await self._explain(view.now, "limit", limited[:1], lambda _job: self._why_not(view, cooling))
        return demand.patient

    async def _start(self, view: View, kind: GpuKind, job: WaitingJob, waiting: int) -> bool:
        """Asks for one pod. False: ask for no more in this look."""
        now = view.now
        seconds = round(view.age(job.queued_at))
        reason = f"{waiting} waiting, the first unserved for {seconds} s (job {job.id}), and no host has room"
        row_id = await self._fleet.ask_for_pod(now, kind, self._limits.max_pods, reason)
        if row_id is None:
            return False
        log.info("fleet_pod_asked", row=str(row_id), gpu_type=kind.id, waiting=waiting, job_id=str(job.id))
        try:
            pod = await self._runpod.create_pod(self._plan.body(f"{NAME_PREFIX}{row_id}", kind))
        except RunPodError as error:
            return await self._not_started(now, row_id, kind, error)
        price = "unknown" if pod.cost_per_hour is None else f"{pod.cost_per_hour:.2f} US dollars an hour"
        await self._fleet.record_pod(now, row_id, pod, "start", f"made, {price}")
        log.info("fleet_pod_started", pod=pod.id, row=str(row_id), gpu_type=kind.id, price_per_hour=pod.cost_per_hour)
        view.listed[row_id] = pod
        return True

    async def _not_started(self, now: datetime, row_id: UUID, kind: GpuKind, error: RunPodError) -> bool:
        if not error.certain:
            # The pod may exist: the row keeps its slot until RunPod's list shows it or not.
            log.warning("fleet_pod_in_doubt", row=str(row_id), gpu_type=kind.id, error=str(error))
            return False
        await self._fleet.end_pod(now, row_id, error.fault, str(error))
        log.warning("fleet_pod_refused", row=str(row_id), gpu_type=kind.id, fault=error.fault, error=str(error))
        # Another GPU type may be available. A refused key or request is refused for every type.
        return error.fault is ApiFault.NO_CAPACITY

    async def _cooling(self, now: datetime) -> set[str]:
        """GPU types whose last pods failed. We avoid them for a while, longer after each failure."""
        cooling = set()
        for kind in await self._fleet.failures(now):
            pause = min(self._settings.fleet_cooldown_seconds * 2.0 ** (kind.failures - 1), MAX_COOL_SECONDS)
            if (now - kind.last_at).total_seconds() < pause:
                cooling.add(kind.gpu_type)
        return cooling

    def _why_not(self, view: View, cooling: set[str]) -> str:
        if sum(row.ended_at is None for row in view.pods) >= self._limits.max_pods:
            return f"jobs wait, and all {self._limits.max_pods} pods are in use (TRAINER_FLEET_MAX_PODS)"
        if cooling:
            return f"jobs wait, and pods with {', '.join(sorted(cooling))} failed a moment ago: cooling down"
        return "jobs wait, and each kind of GPU has reached its max_pods"

    async def _explain(
        self, now: datetime, decision: str, jobs: list[WaitingJob], reason: Callable[[WaitingJob], str]
    ) -> None:
        """Records why a job gets no pod, once, and again only if the reason has changed or had gone."""
        texts = {reason(job) for job in jobs}
        self._said = {said for said in self._said if said[0] != decision or said[1] in texts}
        for text in sorted(texts):
            if (decision, text) not in self._said:
                self._said.add((decision, text))
                log.warning("fleet_waits", why=decision, reason=text)
                await self._fleet.record_decision(now, decision, text)


def _no_card_fits(job: WaitingJob) -> str:
    needs = [f"{job.need_gpus} GPUs", f"{job.need_gpu_memory_gb:g} GB" if job.need_gpu_memory_gb else None]
    needs += [job.need_gpu_type, job.base_model]
    return f"no kind of GPU in the plan serves job {job.id} ({', '.join(need for need in needs if need)})"


def _by_row(pods: list[Pod]) -> dict[UUID, Pod]:
    """The pods with a row's id in their name. All others are not ours."""
    found = {}
    for pod in pods:
        if pod.name.startswith(NAME_PREFIX):
            try:
                found[UUID(pod.name.removeprefix(NAME_PREFIX))] = pod
            except ValueError:
                continue
    return found


def _keys(settings: Settings) -> list[Key]:
    found = [("TRAINER_RUNPOD_API_KEY", settings.runpod_api_key), ("RUNPOD_API_KEY", settings.pod_api_key)]
    keys = [Key(name, key.get_secret_value()) for name, key in found if key is not None]
    if not keys:
        raise HostUnfit("the fleet needs TRAINER_RUNPOD_API_KEY: a key that may read, create and end pods")
    return keys
