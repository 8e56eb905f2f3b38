"""The test that `make image-check` runs inside the built image: doctor, the daemon under supervisord, one whole job.

    python -m tests.image_inside

It uses the image's own user, commands and configuration, with a Postgres and a storage double on loopback, which is all
the network there is. Prints what it sees, and exits with status 0 only if everything passed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
from packaging.utils import canonicalize_name
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from daemon.database.embedded_server import EmbeddedPostgres
from tests.daemon_process import children_of, eventually
from tests.doubles.storage import SERVICE_KEY, Bucket, StorageDouble
from tests.tiny_models import write_conversations

COMMAND = ("bash", "/opt/brightrun/daemon/pod/container.sh")
HEALTHCHECK = ("supervisorctl", "-c", "/opt/brightrun/supervisord.conf", "status", "trainer")
MODEL = "check/tiny"
MODEL_SECONDS = 300.0
JOB_SECONDS = 300.0
DRAIN_SECONDS = 120.0


def main() -> None:
    _show("who", f"user {os.getuid()}, Python {sys.version.split()[0]} in {sys.prefix}")
    assert os.getuid() == 10001, "the image runs as root"
    _prove_that_every_version_is_pinned()
    _prove_that_nothing_is_outside()
    with (
        tempfile.TemporaryDirectory() as scratch,
        EmbeddedPostgres() as postgres,
        _storage(Path(scratch)) as storage,
    ):
        _show("database", postgres.describe())
        environment = _environment(postgres, storage.url)
        _run(["brightrun-trainer", "migrate", "--local"], environment | {"DATABASE_URL": postgres.dsn()})
        with psycopg.connect(postgres.dsn(), autocommit=True, row_factory=dict_row) as app:
            app.execute(f"ALTER ROLE training_daemon LOGIN PASSWORD '{postgres.password}'".encode())
            _make_model(environment)
            _doctor(environment)
            _jobs_under_supervisord(app, storage, environment, Path(scratch))


def _show(name: str, what: object) -> None:
    print(f"{name:<16} {what}", flush=True)


def _prove_that_every_version_is_pinned() -> None:
    pins = Path("/opt/brightrun/constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in pins)}
    # The base image's packages are elsewhere; pip came with the environment, and our own code has its own version.
    found = {canonicalize_name(one.name): one.version for one in distributions(path=[sysconfig.get_path("purelib")])}
    strays = {name: version for name, version in found.items() if pinned.get(name) != version}
    assert strays.keys() <= {"pip", "brightrun-trainer"}, f"not as constraints.txt has them: {strays}"
    _show("versions", f"{len(found) - len(strays)} packages, each as constraints.txt has it")


def _prove_that_nothing_is_outside() -> None:
    # TEST-NET-3 and a well-known public resolver: both must be unreachable at once, not after a timeout.
    for address in (("203.0.113.1", 443), ("1.1.1.1", 53)):
        try:
            socket.create_connection(address, timeout=5).close()
        except OSError as error:
            _show("network", f"{address[0]}: {error.strerror}")
        else:
            raise AssertionError(f"{address[0]} answers: this is no check without a network")


@contextmanager
def _storage(folder: Path) -> Iterator[StorageDouble]:
    """The storage double on its own event loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    double = StorageDouble(folder / "storage")
    asyncio.run_coroutine_threadsafe(double.__aenter__(), loop).result(10)
    try:
        yield double
    finally:
        asyncio.run_coroutine_threadsafe(double.__aexit__(None, None, None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def _environment(postgres: EmbeddedPostgres, storage_url: str) -> dict[str, str]:
    """Returns only what a pod's template sets; nothing added by this test."""
    own = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}}
    return own | {
        "DATABASE_URL": postgres.dsn(user="training_daemon"),
        "SUPABASE_URL": storage_url,
        "SUPABASE_SERVICE_ROLE_KEY": SERVICE_KEY,
        "TRAINER_ALLOWED_HOSTS": storage_url.removeprefix("http://"),
        "TRAINER_CALLBACK_SECRETS": "whsec_aW1hZ2UtY2hlY2stc2VjcmV0LW9mLTMyLWJ5dGVzIQ==",
        "TRAINER_DEFAULT_MODEL": MODEL,
        "TRAINER_DEVICE": "cpu",
        "TRAINER_LEASE_SECONDS": "5",
        "OMP_NUM_THREADS": "2",
    }


def _run(command: list[str], environment: dict[str, str], expected: int = 0) -> str:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MODEL_SECONDS, check=False)
    assert done.returncode == expected, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _make_model(environment: dict[str, str]) -> None:
    """Makes a real model of a few hundred thousand parameters on the volume, with the image's own transformers."""
    code = f"""if True:
        from pathlib import Path
        from tests.tiny_models import make_model
        make_model(Path("/workspace/models/{MODEL}"), "qwen3")
    """
    began = time.monotonic()
    _run([sys.executable, "-c", code], environment | {"PYTHONPATH": os.environ["PYTHONPATH"]})
    _show("model", f"{MODEL} made in {time.monotonic() - began:.1f} s")


def _doctor(environment: dict[str, str]) -> None:
    print("\n$ brightrun-trainer doctor", flush=True)
    print(_run(["brightrun-trainer", "doctor"], environment), flush=True)
    findings = [json.loads(line) for line in _run(["brightrun-trainer", "doctor", "--json"], environment).splitlines()]
    faults = [finding for finding in findings if finding["light"] == "fault"]
    assert len(findings) >= 10 and not faults, findings
    _run(["brightrun-trainer", "doctor"], environment | {"TRAINER_MODELS_DIR": "/proc/nowhere"}, expected=1)
    _run(["brightrun-trainer", "doctor"], environment | {"DATABASE_URL": "nonsense"}, expected=78)


def _jobs_under_supervisord(
    app: psycopg.Connection[dict[str, Any]], storage: StorageDouble, environment: dict[str, str], scratch: Path
) -> None:
    print(f"$ {' '.join(COMMAND)}", flush=True)
    log = scratch / "container.log"
    with log.open("wb") as output:
        # A pipe, like a container's output.
        init = subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert init.stdout is not None
        stream = init.stdout
        copying = threading.Thread(target=lambda: [output.write(line) or output.flush() for line in stream])
        copying.start()
        try:
            _one_job(app, storage, scratch, log, "a row becomes an adapter")
            _show("healthcheck", _run(list(HEALTHCHECK), environment).strip())

            arguments = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children_of(init.pid)}
            (daemon,) = [pid for pid, words in arguments.items() if b"run" in words]
            os.kill(daemon, signal.SIGKILL)
            _one_job(app, storage, scratch, log, "after the daemon was killed")

            began = time.monotonic()
            init.send_signal(signal.SIGTERM)
            assert init.wait(DRAIN_SECONDS) == 0, f"supervisord ended with {init.returncode}\n{_tail(log)}"
            _show("TERM", f"shut down and ended with 0 after {time.monotonic() - began:.1f} s")
        finally:
            if init.poll() is None:
                init.terminate()
                try:
                    init.wait(DRAIN_SECONDS)
                except subprocess.TimeoutExpired:
                    init.kill()
                    init.wait(10)
            copying.join(10)
    assert SERVICE_KEY not in log.read_text(), "the storage key is in the container's log"


def _one_job(
    app: psycopg.Connection[dict[str, Any]], storage: StorageDouble, scratch: Path, log: Path, name: str
) -> None:
    user, dataset = uuid4(), uuid4()
    path = f"{user}/{dataset}.jsonl"
    storage.put("lora-datasets", path, write_conversations(scratch / "data.jsonl", 24).read_bytes())
    storage.buckets.setdefault("lora-models", Bucket())
    with app.transaction():
        app.execute("INSERT INTO auth.users (id, email) VALUES (%s, %s)", (user, f"{user}@example.test"))
        app.execute(
            "INSERT INTO datasets (id, user_id, name, storage_path, file_name, file_size) "
            "VALUES (%s, %s, 'check', %s, 'data.jsonl', 1)",
            (dataset, user, path),
        )
        inserted = app.execute(
            "INSERT INTO training_jobs (user_id, dataset_id, hyperparameters) VALUES (%s, %s, %s) RETURNING id",
            (user, dataset, Jsonb({"base_model": MODEL, "num_epochs": 1, "batch_size": 4, "lora_rank": 8})),
        ).fetchone()
    assert inserted is not None
    row = _final_row(app, inserted["id"], log)
    assert row["status"] == "completed", f"{row['error_code']}: {row['error_message']}\n{_tail(log)}"
    stored = storage.path_of(*row["adapter_path"].split("/", 1)).read_bytes()
    assert hashlib.sha256(stored).hexdigest() == row["adapter_sha256"], "the stored adapter is not the row's"
    taken = (row["completed_at"] - row["queued_at"]).total_seconds()
    loss = row["current_metrics"]["training_loss"]
    _show("job", f"{name}: {row['total_steps']} steps, loss {loss:.2f}, {len(stored)} bytes stored, {taken:.1f} s")


def _final_row(app: psycopg.Connection[dict[str, Any]], job: UUID, log: Path) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        row = app.execute("SELECT * FROM training_jobs WHERE id = %s", (job,)).fetchone()
        return row if row is not None and row["status"] in {"completed", "failed", "cancelled"} else None

    return eventually(look, seconds=JOB_SECONDS, why=lambda: f"the job {job} does not end:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


if __name__ == "__main__":
    main()
