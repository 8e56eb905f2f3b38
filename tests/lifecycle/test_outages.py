"""The database goes away, the network lies, a pooler swallows notifications: no job is lost and none is done twice.

Each test that stops Postgres has a server of its own; cuts and half-open connections are made by a proxy.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from structlog.testing import capture_logs

import daemon.database.listener
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.database.listener import PROOF_LIMIT_SECONDS, Listener
from daemon.schema.migrations import migrate
from tests.daemon_process import DaemonProcess, alive, eventually
from tests.doubles.tcp_proxy import TcpProxy
from tests.lifecycle.queue import Queue

SLOW_POLL = 60
# A minute is what made pgqueuer and procrastinate give up for good.
OUTAGE_SECONDS = [3, pytest.param(60, marks=[pytest.mark.system, pytest.mark.timeout(240)])]
LISTENER, WORK, HEARTBEAT = (
    "brightrun-trainer listener",
    "brightrun-trainer",
    "brightrun-trainer heartbeat",
)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    """A server that may be stopped: nobody else uses it."""
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture(scope="module")
def template(server: EmbeddedPostgres) -> str:
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(b"CREATE DATABASE migrated")
    migrate(server.dsn(dbname="migrated"), local=True)
    return "migrated"


@pytest.fixture
def own_queue(server: EmbeddedPostgres, template: str, tmp_path: Path) -> Queue:
    name = f"outage_{time.time_ns()}"
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
    return Queue(server.dsn(dbname=name), tmp_path)


@pytest.fixture
def proxy(own_queue: Queue) -> Iterator[TcpProxy]:
    port = psycopg.conninfo.conninfo_to_dict(own_queue.dsn)["port"]
    assert port is not None
    with TcpProxy(int(port)) as proxy:
        yield proxy


def until_renewed(queue: Queue, seconds: float = 0.0) -> None:
    """Waits until the job's lease has been renewed this long after now, by the database's clock."""
    (row,) = queue.select("SELECT clock_timestamp() + make_interval(secs => %s) AS at", seconds)
    eventually(lambda: queue.leases()[0]["heartbeat_at"] > row["at"], seconds=seconds + 20)


def trained_steps(folder: Path, job: UUID) -> int:
    """What the child has done, from its checkpoint: the database may be away."""
    steps = [int(path.read_text()) for path in (folder / "jobs" / str(job) / "checkpoints").glob("e*/step")]
    return max(steps, default=0)


def settled_once(queue: Queue, job: UUID) -> bool:
    return queue.story(job).count("completed") == 1 and queue.leases() == []


# -- Postgres stops and starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", OUTAGE_SECONDS)
def test_an_idle_daemon_outlives_an_outage_and_is_awake_at_once(
    server: EmbeddedPostgres, own_queue: Queue, tmp_path: Path, seconds: int
) -> None:
    with own_queue.daemon(tmp_path, poll_seconds=SLOW_POLL) as daemon:
        daemon.wait_for_log("listener_hears")
        server.stop()
        try:
            daemon.wait_for_log("listener_lost")
            time.sleep(seconds)  # the outage itself
        finally:
            server.start()
        daemon.wait_for_log("listener_hears", count=2, seconds=25)
        begun = time.monotonic()
        own_queue.wait_for(own_queue.insert(), "completed")
        assert time.monotonic() - begun < SLOW_POLL / 4 and alive(daemon.pid)


@pytest.mark.parametrize("seconds", OUTAGE_SECONDS)
def test_training_goes_on_through_an_outage_and_ends_with_one_attempt(
    server: EmbeddedPostgres, own_queue: Queue, tmp_path: Path, seconds: int
) -> None:
    lease_seconds = 2
    with (
        own_queue.daemon(tmp_path, name="one", lease_seconds=lease_seconds, metrics_points=0) as one,
        own_queue.daemon(tmp_path, name="two", lease_seconds=lease_seconds, metrics_points=0) as two,
    ):
        steps = 40 * (seconds + lease_seconds)
        gate = tmp_path / "gate"
        job = own_queue.insert(script=[["steps", steps, 0.05, str(gate)]])
        own_queue.wait_for(job, "running")
        server.stop()
        try:
            before = trained_steps(tmp_path, job)
            time.sleep(seconds)
            during = trained_steps(tmp_path, job)
        finally:
            server.start()
        assert during > before + 5 * seconds
        until_renewed(own_queue, 2 * lease_seconds)
        gate.touch()
        row = own_queue.wait_for(job, "completed", seconds=60)
        eventually(lambda: settled_once(own_queue, job))
        assert not one.logged("job_reaped") and not two.logged("job_reaped")
    assert row["attempt"] == 1 and "reaped" not in own_queue.story(job)
    # The reporter caught up: no point of the curve is missing.
    assert [point["step"] for point in own_queue.points(job)] == list(range(1, steps + 1))


def test_a_training_that_ends_during_an_outage_is_completed_after_it(
    server: EmbeddedPostgres, own_queue: Queue, tmp_path: Path
) -> None:
    with own_queue.daemon(tmp_path, lease_seconds=2) as daemon:
        gate = tmp_path / "gate"
        job = own_queue.insert(script=[["steps", 120, 0.03, str(gate)]])
        own_queue.wait_for(job, "running")
        server.stop()
        gate.touch()
        try:
            # What is going to be stored is noted in the database before the first byte is sent.
            daemon.wait_for_log("upload_delayed", seconds=30)
        finally:
            server.start()
        row = own_queue.wait_for(job, "completed")
        eventually(lambda: settled_once(own_queue, job))
    assert row["attempt"] == 1
    assert (tmp_path / "storage" / row["adapter_path"]).stat().st_size == row["adapter_bytes"]


def test_a_server_that_crashes_costs_no_attempt(server: EmbeddedPostgres, own_queue: Queue, tmp_path: Path) -> None:
    with own_queue.daemon(tmp_path, lease_seconds=2):
        gate = tmp_path / "gate"
        job = own_queue.insert(script=[["steps", 100, 0.03, str(gate)]])
        own_queue.wait_for(job, "running")
        server.kill()
        server.start()
        until_renewed(own_queue, 2)
        gate.touch()
        row = own_queue.wait_for(job, "completed")
        eventually(lambda: settled_once(own_queue, job))
    assert row["attempt"] == 1


def test_nobody_is_reaped_for_the_time_that_the_server_was_down(
    server: EmbeddedPostgres, own_queue: Queue, tmp_path: Path
) -> None:
    """pg_cron and the gateway reap as well, and may be back before the daemon is."""
    with own_queue.daemon(tmp_path, lease_seconds=2) as daemon:
        gate = tmp_path / "gate"
        job = own_queue.insert(script=[["steps", 150, 0.03, str(gate)]])
        own_queue.wait_for(job, "running")
        server.stop()
        try:
            daemon.signal(signal.SIGSTOP)
            time.sleep(2.5)  # longer than the lease
        finally:
            server.start()
        with own_queue.connect() as cron:
            assert cron.execute("SELECT * FROM reap_expired_leases()").fetchall() == []
        daemon.signal(signal.SIGCONT)
        until_renewed(own_queue)
        gate.touch()
        assert own_queue.wait_for(job, "completed")["attempt"] == 1


# -- connections that are cut or say nothing any more --------------------------------------------------------------


def test_cut_connections_are_made_again_and_the_job_does_not_notice(
    own_queue: Queue, proxy: TcpProxy, tmp_path: Path
) -> None:
    with DaemonProcess(proxy.dsn(own_queue.dsn), tmp_path, poll_seconds=SLOW_POLL) as daemon:
        daemon.wait_for_log("listener_hears")
        gate = tmp_path / "gate"
        job = own_queue.insert(script=[["steps", 150, 0.02, str(gate)]])
        own_queue.wait_for(job, "running")
        # The heartbeat's connection is made with the first renewal.
        eventually(lambda: proxy.connected() == 3)
        assert proxy.cut() == 3
        until_renewed(own_queue)
        gate.touch()
        row = own_queue.wait_for(job, "completed")
        daemon.wait_for_log("listener_hears", count=2)
    assert row["attempt"] == 1


def test_backends_that_an_operator_terminates_are_replaced(own_queue: Queue, tmp_path: Path) -> None:
    with own_queue.daemon(tmp_path, poll_seconds=SLOW_POLL) as daemon, own_queue.connect() as operator:
        daemon.wait_for_log("listener_hears")
        gate = tmp_path / "gate"
        job = own_queue.insert(script=[["steps", 150, 0.02, str(gate)]])
        own_queue.wait_for(job, "running")
        eventually(
            lambda: own_queue.select(
                "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name LIKE 'brightrun-trainer%%' HAVING count(*) = 3"
            )
        )
        ended = operator.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'brightrun-trainer%'"
        ).fetchall()
        assert len(ended) == 3
        until_renewed(own_queue)
        gate.touch()
        row = own_queue.wait_for(job, "completed")
        daemon.wait_for_log("listener_hears", count=2)
    assert row["attempt"] == 1


def test_a_half_open_listener_is_found_and_replaced(own_queue: Queue, proxy: TcpProxy, tmp_path: Path) -> None:
    with DaemonProcess(proxy.dsn(own_queue.dsn), tmp_path, poll_seconds=300) as daemon:
        daemon.wait_for_log("listener_hears")
        # The session that sent its nonce has the same name, and may be closing still.
        eventually(lambda: proxy.connected(LISTENER) == 1)
        assert proxy.half_open(LISTENER) == 1
        job = own_queue.insert()  # its notification falls into the void
        # It may have been at the last statement of its proof, which has longer than a probe has.
        daemon.wait_for_log("listener_lost", seconds=PROOF_LIMIT_SECONDS + 10)
        own_queue.wait_for(job, "completed")


def test_a_half_open_heartbeat_is_replaced_before_the_lease_runs_out(
    own_queue: Queue, proxy: TcpProxy, tmp_path: Path
) -> None:
    with (
        DaemonProcess(proxy.dsn(own_queue.dsn), tmp_path, name="holder", lease_seconds=9) as holder,
        own_queue.daemon(tmp_path, name="heir", lease_seconds=9) as heir,
    ):
        heir.wait_for_log("listener_hears")
        holder.wait_for_log("listener_hears")
        heir.signal(signal.SIGUSR1)  # so that the job is the holder's
        heir.wait()
        gate = tmp_path / "gate"
        job = own_queue.insert(script=[["steps", 500, 0.04, str(gate)]])
        own_queue.wait_for(job, "running")
        with own_queue.daemon(tmp_path, name="reaper", lease_seconds=1) as reaper:
            # Its connection is made for the first renewal.
            eventually(lambda: proxy.connected(HEARTBEAT) == 1)
            assert proxy.half_open(HEARTBEAT) == 1
            holder.wait_for_log("lease_not_renewed", seconds=20)
            until_renewed(own_queue)
            gate.touch()
            row = own_queue.wait_for(job, "completed", seconds=60)
            assert not reaper.logged("job_reaped")
        assert not holder.logged("lease_lost")
    assert row["attempt"] == 1


@pytest.mark.system  # a statement has thirty-five seconds to answer
def test_a_half_open_work_connection_is_given_up_and_everything_written(
    own_queue: Queue, proxy: TcpProxy, tmp_path: Path
) -> None:
    with DaemonProcess(
        proxy.dsn(own_queue.dsn), tmp_path, lease_seconds=9, log_level="debug", metrics_points=0
    ) as daemon:
        job = own_queue.insert(script=[["steps", 1200, 0.04]])
        own_queue.wait_for(job, "running")
        assert proxy.half_open(WORK) == 1
        row = own_queue.wait_for(job, "completed", seconds=120)
        # Whoever had asked on it first is told; those who waited for their turn find a new one.
        told = ("report_delayed", "ending_delayed", "limits_not_read", "reap_delayed", "worker_row_delayed")
        assert any(daemon.logged(event) for event in (*told, "sight_not_checked", "callbacks_delayed"))
    assert row["attempt"] == 1
    assert [point["step"] for point in own_queue.points(job)] == list(range(1, 1201))


def test_a_partitioned_daemon_that_shall_stop_ends_its_child_and_another_goes_on(
    own_queue: Queue, proxy: TcpProxy, tmp_path: Path
) -> None:
    with DaemonProcess(
        proxy.dsn(own_queue.dsn), tmp_path, name="cut_off", lease_seconds=2, on_partition="stop"
    ) as cut_off:
        gate = tmp_path / "gate"
        job = own_queue.insert(script=[["steps", 150, 0.05, str(gate)]])
        own_queue.wait_for(job, "running")
        children = cut_off.children()
        proxy.partition()
        with own_queue.daemon(tmp_path, name="heir", lease_seconds=2) as heir:
            eventually(lambda: not any(alive(pid) for pid in children), seconds=15)
            cut_off.wait_for_log("attempt_superseded")
            gate.touch()
            row = own_queue.wait_for(job, "completed", seconds=40)
            heir.wait_for_log("job_claimed")
        proxy.heal()
        cut_off.wait_for_log("listener_hears", count=2, seconds=40)
        own_queue.wait_for(own_queue.insert(), "completed")
    assert row["attempt"] == 2 and own_queue.story(job).count("completed") == 1


def test_a_partitioned_daemon_whose_heir_takes_the_folder_from_under_its_trainer_calls_it_superseded(
    own_queue: Queue, proxy: TcpProxy, tmp_path: Path
) -> None:
    """A reaper may be quicker than the host that counts its own lease out, and shares its volume."""
    with DaemonProcess(
        proxy.dsn(own_queue.dsn), tmp_path, name="cut_off", lease_seconds=12, on_partition="stop"
    ) as cut_off:
        gate = tmp_path / "gate"
        job = own_queue.insert(script=[["steps", 1500, 0.05, str(gate)]])
        own_queue.wait_for(job, "running")
        proxy.partition()
        own_queue.select("UPDATE training_leases SET expires_at = clock_timestamp() - interval '1 s'")
        with own_queue.daemon(tmp_path, name="heir", lease_seconds=1) as heir:
            heir.wait_for_log("checkpoints_adopted", seconds=30)
            # Its trainer found no folder for the next checkpoint; that is no failure of the job.
            cut_off.wait_for_log("trainer_ended", returncode=1)
            cut_off.wait_for_log("attempt_superseded", outcome="failed", seconds=40)
            gate.touch()
            row = own_queue.wait_for(job, "completed", seconds=40)
    assert row["attempt"] == 2 and own_queue.story(job).count("completed") == 1


@pytest.mark.parametrize(
    "with_heir",
    [False, pytest.param(True, marks=pytest.mark.system)],  # which waits for two whole trainings
    ids=["alone", "with_an_heir"],
)
def test_of_two_hosts_cut_off_one_stops_as_told_the_other_goes_on_and_each_job_is_completed_once(
    own_queue: Queue, proxy: TcpProxy, tmp_path: Path, with_heir: bool
) -> None:
    through_proxy = proxy.dsn(own_queue.dsn)
    with (
        DaemonProcess(through_proxy, tmp_path, name="stops", on_partition="stop") as stops,
        DaemonProcess(through_proxy, tmp_path, name="goes_on") as goes_on,
        ExitStack() as elsewhere,
    ):
        stops.wait_for_log("listener_hears")
        goes_on.wait_for_log("listener_hears")
        gate = tmp_path / "gate"
        jobs = [own_queue.insert(script=[["steps", 1000, 0.03, str(gate)]]) for _ in range(2)]
        for job in jobs:
            own_queue.wait_for(job, "running")
        stopped, gone_on = sorted(jobs, key=lambda job: len(goes_on.logged("job_claimed", job_id=str(job))))
        (stopping,), (going_on,) = stops.children(), goes_on.children()
        proxy.partition()
        if with_heir:
            # It shares no volume with them.
            heir = own_queue.daemon(tmp_path, name="heir", slots=2, work_dir=tmp_path / "heirs jobs")
            elsewhere.enter_context(heir)
        stops.wait_for_log("attempt_superseded", job_id=str(stopped), seconds=40)
        # Longer than a lease without a word, and only one of them gave up.
        assert not alive(stopping) and alive(going_on)
        now = trained_steps(tmp_path, gone_on)
        eventually(lambda: trained_steps(tmp_path, gone_on) > now + 5)
        gate.touch()
        if with_heir:
            # It comes back with all its work done, when the job is somebody else's.
            goes_on.wait_for_log("trainer_waits", job_id=str(gone_on), seconds=40)
        proxy.heal()
        rows = {job: own_queue.wait_for(job, "completed", seconds=90) for job in jobs}
        eventually(lambda: not own_queue.leases() and not own_queue.select("SELECT FROM training_uploads"))
    assert rows[stopped]["attempt"] == 2 and rows[gone_on]["attempt"] == (2 if with_heir else 1)
    for job, row in rows.items():
        assert own_queue.story(job).count("completed") == 1
        (stored,) = (tmp_path / "storage" / "lora-models" / "adapters").glob(f"{job}*.tar.gz")
        assert row["adapter_path"] == f"lora-models/adapters/{stored.name}"
        with tarfile.open(stored) as archive:
            weights = archive.extractfile("adapter_model.safetensors")
            assert weights is not None and weights.read().startswith(f"epoch {row['lease_epoch']}".encode())


# -- how often it knocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=[pytest.mark.system, pytest.mark.timeout(240)])])
def test_a_database_that_is_away_is_asked_for_again_and_again_but_not_hammered(
    server: EmbeddedPostgres, own_queue: Queue, proxy: TcpProxy, tmp_path: Path, seconds: int
) -> None:
    def gaps(event: str) -> list[float]:
        at = [datetime.fromisoformat(line["timestamp"]) for line in daemon.logged(event)]
        return [(later - earlier).total_seconds() for earlier, later in pairwise(at)]

    late = 2.0  # on a busy machine
    with DaemonProcess(proxy.dsn(own_queue.dsn), tmp_path, poll_seconds=1) as daemon:
        daemon.wait_for_log("listener_hears")
        # The listener's first word and the daemon's first look are two reasons to claim in the same moment.
        own_queue.wait_for(own_queue.insert(), "completed")
        before = proxy.asked
        server.stop()
        try:
            daemon.wait_for_log("listener_lost")
            time.sleep(seconds)  # the outage itself
            asked = proxy.asked - before
            listening, working = gaps("listener_lost"), gaps("claim_failed")
        finally:
            server.start()
        daemon.wait_for_log("listener_hears", count=2, seconds=40)
        own_queue.wait_for(own_queue.insert(), "completed")
    # The listener: each wait is drawn from twice as wide a range as the one before, up to fifteen seconds.
    ranges = [min(0.2 * 2**number, 15.0) for number in range(len(listening))]
    assert all(gap <= widest + late for gap, widest in zip(listening, ranges, strict=True)), listening
    assert any(gap < 0.9 * widest for gap, widest in zip(listening, ranges, strict=True)), "no jitter"
    assert 3 <= len(listening) <= 10 + seconds / 2
    # The work connection: once a second for as long as it takes.
    assert all(0.9 <= gap <= 1.0 + late for gap in working) and len(working) >= seconds / 3, working
    # All three together, the reaper's and the heartbeats' attempts included.
    assert asked <= 5 * (seconds + late)


async def test_the_listeners_backoff_begins_anew_after_a_connection_that_was_good(
    own_queue: Queue, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken = asyncio.Event()
    listener = Listener(proxy.dsn(own_queue.dsn), wake=woken.set, on_cancel=lambda _job: None)

    async def cut_again() -> int:
        await woken.wait()
        woken.clear()
        proxy.cut(LISTENER)
        await woken.wait()
        return int([line for line in logged if line["event"] == "listener_lost"][-1]["attempt"])

    with capture_logs() as logged:
        listening = asyncio.create_task(listener.run())
        try:
            # Cut before the first probe, as an outage that comes and goes.
            assert [await cut_again() for _ in range(4)] == [1, 2, 3, 4]
            monkeypatch.setattr(daemon.database.listener, "PROBE_SECONDS", 0.05)
            assert await cut_again() == 5
            await asyncio.sleep(1.0)  # many probes
            assert await cut_again() == 1
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


# -- a transaction pooler ------------------------------------------------------------------------------------------


@pytest.fixture
def pooled(own_queue: Queue, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The queue's URL through PgBouncer in transaction mode, on the port where Supabase's stands."""
    given = psycopg.conninfo.conninfo_to_dict(own_queue.dsn)
    # An address of loopback that nobody else uses: the port is the one that the daemon knows poolers by.
    address, port = "127.43.0.1", 6543
    folder = tmp_path_factory.mktemp("pgbouncer")
    (folder / "users.txt").write_text(f'"{given["user"]}" "{given["password"]}"\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n{given['dbname']} = host=127.0.0.1 port={given['port']}\n"
        f"[pgbouncer]\nlisten_addr = {address}\nlisten_port = {port}\nunix_socket_dir =\nauth_type = plain\n"
        f"auth_file = {folder}/users.txt\npool_mode = transaction\ndefault_pool_size = 4\n"
    )
    command = ["/usr/sbin/pgbouncer", str(folder / "pgbouncer.ini")]
    # PgBouncer refuses to run as root, as Postgres does.
    user = "nobody" if os.geteuid() == 0 else None
    if user:
        entry = pwd.getpwnam(user)
        for path in (folder, *folder.iterdir()):
            os.chown(path, entry.pw_uid, entry.pw_gid)
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and parent.name.startswith(("pytest-", "popen-")):
                parent.chmod(0o755)
    with (folder / "log").open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log, user=user) as pooler:
        dsn = f"postgresql://{given['user']}:{given['password']}@{address}:{port}/{given['dbname']}"

        def answers() -> bool:
            assert pooler.poll() is None, (folder / "log").read_text()
            try:
                psycopg.connect(dsn, prepare_threshold=None).close()
            except psycopg.OperationalError:
                return False
            return True

        eventually(answers, seconds=10)
        yield dsn
        pooler.terminate()


@pytest.mark.system
def test_behind_a_transaction_pooler_the_daemon_says_so_and_finds_jobs_by_its_poll(
    own_queue: Queue, pooled: str, tmp_path: Path
) -> None:
    with DaemonProcess(pooled, tmp_path, poll_seconds=1) as daemon:
        deaf = daemon.wait_for_log("listener_deaf", seconds=20)
        assert deaf["port"] == 6543 and "session pooler (port 5432)" in deaf["advice"]
        row = own_queue.wait_for(own_queue.insert(script=[["steps", 50, 0.02]]), "completed")
        second = own_queue.wait_for(own_queue.insert(), "completed", seconds=15)
    assert row["attempt"] == 1 and second["attempt"] == 1
    assert len(own_queue.points(row["id"])) == 50
