"""Everything that can go wrong with hosts, processes, connections and the server, at random, and a judge apart.

Seeded: CHAOS_SEED repeats a run's order of faults (not its timing). The judge (oracle.py) is a script of its own that
knows only what an audit trigger recorded; that it can say no is tested here as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote
from uuid import UUID

import psycopg
import pytest

from daemon.database.connection import Database
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.database.statements import statement
from daemon.errors import DatabaseAway, LeaseLost
from daemon.queue.rows import MetricPoint
from daemon.queue.sql_job_store import SqlJobStore
from daemon.schema.migrations import migrate
from daemon.storage.interface import Location
from daemon.storage.upload_log import SqlUploadLog
from tests.daemon_process import REAL, SCRIPTED, DaemonProcess, children_of
from tests.doubles.tcp_proxy import TcpProxy
from tests.forked_process import PipedProcess, forker
from tests.lifecycle.queue import Queue
from tests.lifecycle.test_peer_failures import STALE_WRITES, claim, reaped_lease
from tests.paths import ROOT
from tests.tiny_models import conversation, make_model

ORACLE = Path(__file__).with_name("oracle.py")
LEASE_SECONDS = 2
REAL_MODEL = "tiny-real"


def as_host(dsn: str, host: str) -> str:
    """The URL under which the audit knows this client."""
    return f"{dsn}?options={quote(f'-c audit.host={host}')}"


def run_oracle(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    judging = PipedProcess(forker(str(ORACLE)), os.environ, ROOT, dsn, *arguments)
    told, errors = judging.communicate(120)
    return subprocess.CompletedProcess([str(ORACLE), *arguments], judging.wait(10), told, errors)


@pytest.fixture
def server() -> Iterator[EmbeddedPostgres]:
    # A commit survives a kill of the server; only the machine's own crash is not waited for.
    with EmbeddedPostgres(settings={"synchronous_commit": "on"}) as server:
        migrate(server.dsn(), local=True)
        yield server


# -- the chaos -------------------------------------------------------------------------------------------------


class Ambush:
    """Stops the trainer of a host at a checkpoint of each of its jobs, once, until somebody has ended it.

    By progress and not by the clock: on a quick machine a training is over before the next fault's turn comes."""

    def __init__(self, host: Host, jobs_folder: Path) -> None:
        self._host = host
        self._checkpoints = jobs_folder
        self._seen: set[UUID] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._lie_in_wait, name="ambush", daemon=True)
        # The job and the trainer's process, stopped; None: nothing is held.
        self.held: tuple[UUID, int] | None = None
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join(10)

    def _lie_in_wait(self) -> None:
        while not self._over.wait(0.02):
            # Folders come and go while we look.
            with contextlib.suppress(OSError):
                if self.held is None:
                    self._look()

    def _look(self) -> None:
        for checkpoint in self._checkpoints.glob("*/checkpoints/e*/checkpoint-*"):
            job = UUID(checkpoint.parents[2].name)
            if job not in self._seen and (trainer := self._trainer()) is not None:
                self._seen.add(job)
                self.held = (job, trainer)
                return

    def _trainer(self) -> int | None:
        """One place, one trainer: stopped with the process of the job that it has forked."""
        daemon = self._host.daemon
        for pid in children_of(daemon.pid) if daemon is not None else ():
            os.killpg(pid, signal.SIGSTOP)
            return pid
        return None


@dataclass
class Host:
    """One place in the fleet: whoever is booted there has a name of his own."""

    place: str
    through: TcpProxy | None
    settings: Mapping[str, Any]
    command: tuple[str, ...] = SCRIPTED
    boots: int = 0
    daemon: DaemonProcess | None = None
    continues_at: float | None = None
    ambush: Ambush | None = None


class Chaos:
    """A fleet on one queue, and the faults that befall it. Nothing of it is alive after the block."""

    def __init__(self, server: EmbeddedPostgres, proxy: TcpProxy, folder: Path, seed: int) -> None:
        self.server, self.proxy, self.folder = server, proxy, folder
        self.order = random.Random(seed)
        self.queue = Queue(as_host(server.dsn(), "app"), folder)
        self.hosts: list[Host] = []
        self.faults: Counter[str] = Counter()
        self.killed_in_training: set[UUID] = set()
        # What an operator or the app did to the schema, and when and how it is undone.
        self.undoing: list[tuple[float, str]] = []
        self.locking: list[psycopg.Connection] = []

    def __enter__(self) -> Chaos:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            if host.ambush is not None:
                host.ambush.end()
            if host.daemon is not None:
                host.daemon.kill()

    def add_host(
        self, place: str, *, through: TcpProxy | None = None, command: tuple[str, ...] = SCRIPTED, **settings: Any
    ) -> None:
        host = Host(place, through, {"lease_seconds": LEASE_SECONDS, "poll_seconds": 1, **settings}, command)
        self.hosts.append(host)
        self.boot(host)
        if command == REAL:
            # A work folder of its own: the scripted trainings next door lie in no ambush.
            host.ambush = Ambush(host, Path(settings["work_dir"]))

    def boot(self, host: Host) -> None:
        host.boots += 1
        name = f"{host.place}-{host.boots}"
        dsn = as_host(self.server.dsn(), name)
        host.daemon = DaemonProcess(
            host.through.dsn(self.server.dsn()) + dsn[len(self.server.dsn()) :] if host.through else dsn,
            # Started, for the judge looks for what is left by its environment.
            self.folder, name=name, command=host.command, forked=False, **host.settings,
        ).start()  # fmt: skip

    # Each fault is one that a fleet meets in a year; all of them in a minute here.

    def kill_daemon(self) -> None:
        host = self._any_awake()
        if host is not None and host.daemon is not None:
            host.daemon.kill()
            self.boot(host)

    def kill_child(self) -> None:
        host = self._any_awake()
        children = host.daemon.children() if host is not None and host.daemon is not None else []
        if children:
            try:
                os.kill(self.order.choice(children), signal.SIGKILL)
            except ProcessLookupError:
                return

    def kill_real_trainings(self) -> None:
        """Each real training once, where the ambush holds it: its next attempt goes on from its checkpoint."""
        for host in self.hosts:
            if host.ambush is None or host.daemon is None:
                continue
            held = host.ambush.held
            if held is None:
                continue
            job, trainer = held
            self.killed_in_training.add(job)
            # Now the child alone, now its host with it: the one is retried, the other reaped.
            if len(self.killed_in_training) % 2:
                os.kill(trainer, signal.SIGKILL)
            else:
                host.daemon.kill()
                self.boot(host)
            host.ambush.held = None

    def stop_past_the_lease(self) -> None:
        host = self._any_awake()
        if host is not None and host.daemon is not None and sum(h.continues_at is not None for h in self.hosts) < 2:
            host.daemon.signal(signal.SIGSTOP)
            host.continues_at = time.monotonic() + LEASE_SECONDS * self.order.uniform(1.2, 1.8)

    def terminate_backend(self) -> None:
        with self.queue.connect() as operator:
            operator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name LIKE 'brightrun-trainer%' ORDER BY random() LIMIT 2"
            )

    def restart_postgres(self) -> None:
        self.server.stop()
        time.sleep(self.order.uniform(0.0, 1.5))
        self.server.start()

    def crash_postgres(self) -> None:
        self.server.kill()
        self.server.start()

    def cut_the_network(self) -> None:
        self.proxy.cut()

    def leave_half_open(self) -> None:
        self.proxy.half_open(self.order.choice([None, "brightrun-trainer listener", "brightrun-trainer heartbeat"]))

    def heal_the_network(self) -> None:
        self.proxy.heal()

    def cancel(self) -> None:
        job = self._any_job("status IN ('queued', 'initializing', 'running')")
        if job is not None:
            try:
                self.queue.cancel_as_owner(job)
            except psycopg.Error as refusal:
                # It ended in the meantime, or rights are missing that a trigger of ours needs.
                if refusal.sqlstate != "PT409" and not self.undoing:
                    raise

    def resubmit(self) -> None:
        job = self._any_job("status IN ('failed', 'cancelled')")
        if job is not None:
            try:
                with self.queue.connect() as app:
                    app.execute("SELECT retry_training_job(%s)", (job,))
            except psycopg.Error:
                if not self.undoing:
                    raise

    def drain(self) -> None:
        """A pod is preempted: TERM, and another one comes."""
        host = self._any_awake()
        if host is not None and host.daemon is not None and host.daemon.logged("daemon_started"):
            # An ending that cannot be written is waited for, however long: what hinders it goes first.
            self.undo(everything=True)
            host.daemon.signal(signal.SIGTERM)
            host.daemon.wait(60)
            self.boot(host)

    # What operators and apps do to the schema: each is undone within seconds, as most of it is in life.

    def revoke_a_right(self) -> None:
        self._until_undone(*self.order.choice(RIGHTS))

    def hide_rows(self) -> None:
        """A restrictive policy binds the daemon's role as well: rows are there and cannot be seen."""
        name = f"hides_{self.order.randrange(10**9)}"
        table = self.order.choice(["training_jobs", "training_leases"])
        column = "id" if table == "training_jobs" else "job_id"
        hidden = self.order.choice(["false", f"md5({column}::text) > '8'"])
        self._until_undone(
            f"CREATE POLICY {name} ON {table} AS RESTRICTIVE USING ({hidden})", f"DROP POLICY {name} ON {table}"
        )

    def refuse_a_row(self) -> None:
        """The app's own trigger raises for one job, whatever the daemon does to it."""
        job = self._any_job("status IN ('queued', 'initializing', 'running')")
        if job is None:
            return
        name = f"refuses_{self.order.randrange(10**9)}"
        self._until_undone(
            f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN IF current_user = 'training_daemon' "
            f"AND NEW.id = '{job}' THEN RAISE EXCEPTION 'the app takes no change of this row'; END IF; "
            f"RETURN NEW; END$$; CREATE TRIGGER {name} BEFORE UPDATE ON training_jobs "
            f"FOR EACH ROW EXECUTE FUNCTION {name}()",
            f"DROP TRIGGER {name} ON training_jobs; DROP FUNCTION {name}",
        )

    def lock_a_table(self) -> None:
        """As VACUUM FULL does, for longer than a lease; the server itself ends it."""
        table = self.order.choice(["training_jobs", "training_leases", "training_events"])
        milliseconds = round(1000 * LEASE_SECONDS * self.order.uniform(1.2, 2.0))
        locking = psycopg.connect(self.server.dsn())
        locking.execute(f"SET idle_in_transaction_session_timeout = {milliseconds}".encode())
        locking.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        self.locking.append(locking)

    def _until_undone(self, done: str, undone: str) -> None:
        self._as_operator(done)
        self.undoing.append((time.monotonic() + self.order.uniform(0.5, 3.0), undone))

    def undo(self, *, everything: bool = False) -> None:
        for due in [due for due in self.undoing if everything or due[0] <= time.monotonic()]:
            self.undoing.remove(due)
            self._as_operator(due[1])
        for locking in self.locking:
            if everything or locking.broken or locking.closed:
                locking.close()
        self.locking = [locking for locking in self.locking if not locking.closed]

    def _as_operator(self, statements: str) -> None:
        with psycopg.connect(self.server.dsn(), autocommit=True) as operator:
            operator.execute(statements.encode())

    def boot_again(self) -> None:
        """Who is started into a database without its rights says so and leaves; who was healthy stays."""
        for host in self.hosts:
            if host.daemon is not None and host.daemon.process is not None and host.daemon.process.poll() is not None:
                assert not host.daemon.logged("job_claimed"), f"a healthy daemon ended\n{host.daemon.tail()}"
                self.boot(host)

    def _any_awake(self) -> Host | None:
        # The host of the real trainings has its own kills; at this pace it would never get as far as a step.
        awake = [host for host in self.hosts if host.continues_at is None and host.command != REAL]
        return self.order.choice(awake) if awake else None

    def _any_job(self, condition: str) -> UUID | None:
        with self.queue.connect() as app:
            row = app.execute(
                f"SELECT id FROM training_jobs WHERE {condition} AND base_model = 'tiny' "
                "ORDER BY md5(id::text || %s) LIMIT 1".encode(),
                (str(self.order.random()),),
            ).fetchone()
        return None if row is None else row["id"]

    def wake_sleepers(self, *, all_of_them: bool = False) -> None:
        for host in self.hosts:
            if host.continues_at is not None and (all_of_them or time.monotonic() >= host.continues_at):
                assert host.daemon is not None
                host.daemon.signal(signal.SIGCONT)
                host.continues_at = None

    def be_impatient(self) -> None:
        """What was reaped often waits minutes; its owner may say "now", as long as it is queued."""
        with self.queue.connect() as app:
            app.execute("UPDATE training_jobs SET run_after = NULL WHERE status = 'queued' AND run_after IS NOT NULL")

    def rage(self, faults: Mapping[str, int], seconds: float) -> None:
        """Fault after fault, by weight, until the time is over or nothing is left to disturb."""
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at and (self.unfinished() or self.undelivered()):
            name = self.order.choices(list(faults), list(faults.values()))[0]
            getattr(self, name)()
            self.faults[name] += 1
            self.undo()
            self.boot_again()
            self.kill_real_trainings()
            self.wake_sleepers()
            self.be_impatient()
            time.sleep(self.order.uniform(0.1, 0.5))

    def calm(self, seconds: float) -> None:
        """No more faults: everything that is left must end now, and every daemon leave in good order.

        `seconds` is how long nothing may move. How long it all takes is the machine's affair."""
        self.wake_sleepers(all_of_them=True)
        self.proxy.heal()
        self.undo(everything=True)
        seen: list[object] = []
        moved_at = time.monotonic()
        while (left := self.unfinished()) or self.queue.leases() or self.undelivered():
            moves = [(job["id"], job["status"], job["attempt"], job["current_step"]) for job in left]
            moves += [(each["job_id"], each["kind"], each["state"], each["attempts"]) for each in self.undelivered()]
            if moves != seen:
                seen, moved_at = moves, time.monotonic()
            assert time.monotonic() < moved_at + seconds, f"left over: {left} {self.undelivered()}\n{self._tails()}"
            self.boot_again()
            self.kill_real_trainings()
            self.be_impatient()
            time.sleep(0.1)
        for host in self.hosts:
            assert host.daemon is not None
            # Before that a TERM simply ends the process: nothing is held yet.
            host.daemon.wait_for_log("daemon_started", seconds=60)
            host.daemon.signal(signal.SIGTERM)
        for host in self.hosts:
            assert host.daemon is not None and host.daemon.wait(60) == 0, self._tails()

    def unfinished(self) -> list[dict[str, Any]]:
        with self.queue.connect() as app:
            return app.execute(
                "SELECT id, status, attempt, current_step, due, run_after, lease_epoch, lease.epoch, lease.expires_at, "
                "clock_timestamp() AS now FROM training_jobs LEFT JOIN training_leases AS lease ON job_id = id "
                "WHERE status NOT IN ('completed', 'failed', 'cancelled') ORDER BY id"
            ).fetchall()

    def undelivered(self) -> list[dict[str, Any]]:
        with self.queue.connect() as app:
            return app.execute(
                "SELECT job_id, kind, state, attempts, claims, next_at, error_message, clock_timestamp() AS now "
                "FROM training_deliveries WHERE state IN ('waiting', 'running') ORDER BY id"
            ).fetchall()

    def _tails(self) -> str:
        return "\n\n".join(f"{host.place}\n{host.daemon.tail(8)}" for host in self.hosts if host.daemon is not None)

    def judge(self) -> subprocess.CompletedProcess[str]:
        dsn = as_host(self.server.dsn(), "oracle")
        return run_oracle(dsn, "--storage", str(self.folder / "storage"), "--processes-of", str(self.folder))


# Taken and given back, and what of it concerns hosts at work.
RIGHTS = [
    ("REVOKE SELECT ON training_leases FROM training_daemon", "GRANT SELECT ON training_leases TO training_daemon"),
    ("REVOKE USAGE ON SCHEMA public FROM training_daemon, PUBLIC", "GRANT USAGE ON SCHEMA public TO PUBLIC"),
    ("REVOKE SELECT ON training_jobs FROM training_daemon", "GRANT SELECT ON training_jobs TO training_daemon"),
    ("REVOKE INSERT ON training_events FROM training_daemon", "GRANT INSERT ON training_events TO training_daemon"),
    ("REVOKE DELETE ON training_leases FROM training_daemon", "GRANT DELETE ON training_leases TO training_daemon"),
]

FAULTS = {
    "kill_daemon": 5, "kill_child": 6, "stop_past_the_lease": 4, "terminate_backend": 4, "restart_postgres": 1,
    "crash_postgres": 1, "cut_the_network": 3, "leave_half_open": 2, "heal_the_network": 4, "cancel": 3, "resubmit": 3,
    "drain": 1,
}  # fmt: skip
FAULTS_OF_THE_SCHEMA = {"revoke_a_right": 2, "hide_rows": 2, "refuse_a_row": 2, "lock_a_table": 2}


def seed_of_the_run() -> int:
    return int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1_000_000))


def insert_short_jobs(chaos: Chaos, count: int) -> None:
    for _ in range(count):
        order = chaos.order
        script: list[list[object]] = [["steps", order.randint(4, 16), order.choice([0.01, 0.03, 0.06])]]
        if order.random() < 0.1:
            script.insert(0, ["ignore_term"])
        if order.random() < 0.1:
            script.insert(0, ["steps", 3, 0.01])
            script.insert(1, ["kill_self_once"])
        # What follows a job is done by any host, and the faults go on meanwhile.
        exports = order.choice([[], [], [], [], ["merged"], ["merged", "transformers4"]])
        chaos.queue.insert(
            script=script,
            hyperparameters={"base_model": "tiny"} | ({"exports": exports} if exports else {}),
            max_attempts=order.choice([1, 3, 20, 20, 20]),
        )


def insert_real_jobs(chaos: Chaos, count: int) -> None:
    """Real trainings of a small model on the CPU, long enough to be killed in the middle."""
    make_model(chaos.folder / "models" / REAL_MODEL, "llama")
    for number in range(count):
        chaos.queue.insert(
            lines=[json.dumps(conversation(100 * number + line)) for line in range(32)],
            hyperparameters={"base_model": REAL_MODEL, "batch_size": 4, "num_epochs": 40, "lora_rank": 4},
            max_attempts=50,
        )


def report(chaos: Chaos, seed: int, verdict: subprocess.CompletedProcess[str], seconds: float) -> None:
    faults = ", ".join(f"{count} {name}" for name, count in sorted(chaos.faults.items()))
    boots, killed = sum(host.boots for host in chaos.hosts), len(chaos.killed_in_training)
    print(f"\nchaos seed {seed}, {seconds:.0f} s, {boots} boots, {killed} real trainings killed; {faults}")
    print(f"{verdict.stdout}{verdict.stderr}")


@pytest.mark.timeout(170)
def test_a_short_chaos_leaves_every_job_ended_once(
    server: EmbeddedPostgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_chaos(server, tmp_path, capsys, FAULTS, jobs=60, rage_seconds=22, calm_seconds=90)


@pytest.mark.system
@pytest.mark.timeout(240)
def test_a_chaos_in_the_schema_as_well_leaves_every_job_ended_once(
    server: EmbeddedPostgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_chaos(server, tmp_path, capsys, FAULTS | FAULTS_OF_THE_SCHEMA, jobs=60, rage_seconds=30, calm_seconds=120)


@pytest.mark.system
@pytest.mark.timeout(1800)
def test_a_long_chaos_leaves_every_job_ended_once(
    server: EmbeddedPostgres, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = FAULTS | FAULTS_OF_THE_SCHEMA
    run_chaos(server, tmp_path, capsys, faults, jobs=240, rage_seconds=150, calm_seconds=120, trainings=6)


def run_chaos(
    server: EmbeddedPostgres,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    faults: Mapping[str, int],
    *,
    jobs: int,
    rage_seconds: float,
    calm_seconds: float,
    trainings: int = 0,
) -> None:
    seed, begun = seed_of_the_run(), time.monotonic()
    assert run_oracle(server.dsn(), "--install").returncode == 0
    with TcpProxy(server.port) as proxy, Chaos(server, proxy, folder, seed) as chaos:
        insert_short_jobs(chaos, jobs)
        # Long enough to be killed in the middle.
        (folder / "models" / "tiny").mkdir(parents=True, exist_ok=True)
        (folder / "models" / "tiny" / "export.json").write_text('{"seconds": 0.4}')
        for number in range(4):
            through = proxy if number % 2 else None
            chaos.add_host(f"host{number}", through=through, slots=2, allowed_models="tiny")
        if trainings:
            insert_real_jobs(chaos, trainings)
            chaos.add_host(
                "trainer",
                command=REAL,
                allowed_models=REAL_MODEL,
                checkpoint_seconds=0.1,
                work_dir=folder / "trainings",
            )
        chaos.rage(faults, rage_seconds)
        chaos.calm(calm_seconds)
        assert len(chaos.killed_in_training) == trainings, "not every real training was killed in mid-run"
        for job in chaos.killed_in_training:
            assert "resumed" in chaos.queue.story(job), f"seed {seed}: {job} did not go on from its checkpoint"
        verdict = chaos.judge()
        with capsys.disabled():
            report(chaos, seed, verdict, time.monotonic() - begun)
        assert verdict.returncode == 0, f"seed {seed}\n{verdict.stdout}{verdict.stderr}"


# -- the judge can say no ----------------------------------------------------------------------------------------

EPOCH_PREDICATE = re.compile(
    r"^ *(?:AND|WHERE) \((?:lease|job)\.(?:lease_)?epoch, (?:lease|job)\.(?:lease_)?token\) "
    r"= \(%\(epoch\)s, %\(token\)s\)\n",
    re.MULTILINE,
)


def without_epoch(statement: str) -> str:
    mutated, cuts = EPOCH_PREDICATE.subn("", statement, count=1)
    assert cuts == 1, statement
    return mutated


def test_a_daemon_whose_heartbeat_forgets_its_epoch_is_found_out(server: EmbeddedPostgres, tmp_path: Path) -> None:
    """The whole line once more, with one predicate deleted from a copy of the statements."""
    shutil.copytree(ROOT / "sql", tmp_path / "mutated" / "sql")
    renew = tmp_path / "mutated" / "sql" / "queries" / "queue" / "renew_lease.sql"
    renew.write_text(without_epoch(renew.read_text()))
    assert run_oracle(server.dsn(), "--install").returncode == 0
    queue = Queue(as_host(server.dsn(), "app"), tmp_path)
    sleeper = DaemonProcess(as_host(server.dsn(), "sleeper"), tmp_path, name="sleeper", lease_seconds=LEASE_SECONDS)
    # The first folder on the path wins: this daemon reads the copy.
    sleeper.environment["PYTHONPATH"] = f"{tmp_path / 'mutated'}{os.pathsep}{sleeper.environment['PYTHONPATH']}"
    heir = DaemonProcess(as_host(server.dsn(), "heir"), tmp_path, name="heir", lease_seconds=LEASE_SECONDS)
    with sleeper:
        job = queue.insert(script=[["steps", 120, 0.05]])
        queue.wait_for(job, "running")
        sleeper.signal(signal.SIGSTOP)
        with heir:
            heir.wait_for_log("job_claimed", seconds=30)
            sleeper.signal(signal.SIGCONT)
            queue.wait_for(job, "completed", seconds=40)
    verdict = run_oracle(as_host(server.dsn(), "oracle"))
    assert verdict.returncode == 1 and "sleeper renewed the lease 1 of heir" not in verdict.stdout
    assert "sleeper renewed the lease 2 of heir" in verdict.stdout


@pytest.mark.parametrize("write", STALE_WRITES)
async def test_each_statement_without_its_epoch_turns_the_judge_red(queue: Queue, write: str) -> None:
    """A stale owner says it once, with and without the predicate: only the latter is a violation."""
    assert run_oracle(queue.dsn, "--install").returncode == 0
    app = Queue(as_host(queue.dsn, "app"), queue.folder)
    app.insert(hyperparameters={"base_model": "tiny"})
    async with (
        Database(as_host(queue.dsn, "stale"), application_name="stale") as one,
        ForgetfulDatabase(as_host(queue.dsn, "stale"), application_name="stale") as forgetful,
        Database(as_host(queue.dsn, "heir"), application_name="heir") as other,
    ):
        lease = await reaped_lease(SqlJobStore(one))
        heir = await claim(SqlJobStore(other))
        await SqlJobStore(other).start_job(heir)
        await SqlJobStore(other).record_metrics(
            heir, [MetricPoint(step=1, epoch=0, training_loss=1.0, learning_rate=1.0, throughput=2.0)]
        )
        await SqlUploadLog(other).record_upload(heir, "checkpoint", Location("s", "lora-models"), ["heir"], step=1)
        if write in {"end_cancelled_job", "settle_cancelled_job"}:
            app.cancel_as_owner(heir.job_id)
        with pytest.raises(LeaseLost):
            await STALE_WRITES[write](SqlJobStore(one), lease)
        assert "stale " not in offences(queue.dsn)
        try:
            await STALE_WRITES[write](SqlJobStore(forgetful), lease)
        except (LeaseLost, DatabaseAway) as refused:
            raise AssertionError("the mutation made no difference") from refused
    assert "stale " in offences(queue.dsn)


def offences(dsn: str) -> str:
    """What the judge says about the host called stale; the job itself has not ended yet, which is not the question."""
    lines = run_oracle(as_host(dsn, "oracle")).stdout.splitlines()[1:]
    kinds = ("stale", "lease taken", "terminal state left", "completed", "ending", "reaped")
    return "\n".join(line for line in lines if line.startswith(kinds) and "stale" in line)


class ForgetfulDatabase(Database):
    """Its statements forgot their epoch."""

    async def fetch(self, text: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        stale = any(text == statement(name) for name in STALE_WRITES)
        return await super().fetch(without_epoch(text) if stale else text, parameters)
