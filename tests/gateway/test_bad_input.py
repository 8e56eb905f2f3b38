"""What strangers, mistakes and attacks get from the gateway, and that a running job does not notice them."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psycopg
import pytest

from daemon.gateway.access import keys as gateway_keys
from tests.daemon_process import DaemonProcess, eventually
from tests.gateway.conftest import KEY, Gateway
from tests.lifecycle.queue import Queue
from tests.postgres import Server

GOOD = {"dataset_url": "https://files.example.com/d.jsonl"}
UNKNOWN = "00000000-0000-4000-8000-000000000000"


def test_every_route_but_the_open_ones_asks_for_a_key(gateway: Gateway) -> None:
    with httpx.Client(base_url=gateway.url) as stranger:
        described = stranger.get("/openapi.json").json()["paths"]
        for path, methods in described.items():
            for method in methods:
                expected = 200 if path in ("/healthz", "/readyz") else 401
                answer = stranger.request(method, path)
                assert answer.status_code == expected, (path, answer.text)
        assert stranger.get("/no/such/path").status_code == 401


def test_a_wrong_key_is_refused_with_401(gateway: Gateway) -> None:
    nearly = (f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY.upper()}", f"Basic {KEY}", KEY)
    with httpx.Client(base_url=gateway.url) as stranger:
        for authorization in ("", "Bearer", *nearly, "Bearer \xff\xfe"):
            headers = {"Authorization": authorization.encode("latin-1")}
            answer = stranger.get(f"/training/status/{UNKNOWN}", headers=headers)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["hint"] == "Send Authorization: Bearer KEY."


def test_every_key_is_compared_whole_whatever_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a near guess nor the place of the right key shows in the work that is done."""
    compared: list[tuple[int, int]] = []

    def compare(known: bytes, given: bytes) -> bool:
        compared.append((len(known), len(given)))
        return known == given

    monkeypatch.setattr(gateway_keys.hmac, "compare_digest", compare)
    keys = gateway_keys.KeyRing(("first-key-of-these-three", "second-key", "third"))
    for sent in ("Bearer first-key-of-these-three", "Bearer third", "Bearer first-key-of-these-threX", "Bearer x", ""):
        compared.clear()
        keys.find(sent)
        assert compared == [(32, 32)] * 3, sent


def test_each_of_several_keys_opens_and_key_guessing_is_slowed_down_for_strangers_only(
    queue: Queue, tmp_path: Path
) -> None:
    other = "another-key-for-the-rotation"
    with Gateway(queue, tmp_path, gateway_keys=f"{KEY},{other}") as gateway:
        for key in (KEY, other):
            with gateway.client(key) as client:
                assert client.get("/health").status_code == 200
        with gateway.client("a guess that is wrong") as guesser, gateway.client() as client:
            with ThreadPoolExecutor(8) as crowd:
                answers = list(crowd.map(lambda _: guesser.get("/health"), range(200)))
            assert {answer.status_code for answer in answers} == {401, 429}
            assert client.get("/health").status_code == 200
    assert KEY not in gateway.log_path.read_text()


def test_what_is_no_job_is_answered_with_every_fault(client: httpx.Client, queue: Queue) -> None:
    bad = {
        "dataset_url": "https://files.example.com/d.jsonl",
        "hyperparameters": {"learning_rate": 5, "lora_rank": "wide", "num_epochs": 0},
        "gpu_config": {"num_gpus": -1},
    }
    answer = client.post("/training/submit", json=bad)
    assert answer.status_code == 422
    assert {fault["field"] for fault in answer.json()["faults"]} == {
        "hyperparameters.learning_rate", "hyperparameters.lora_rank", "hyperparameters.num_epochs",
        "gpu_config.num_gpus",
    }  # fmt: skip
    with queue.connect() as connection:
        assert connection.execute("SELECT FROM training_jobs").fetchall() == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b'{"dataset_url": "https://a.example/\xff"}', 400),
        (b"[]", 422),
        (b'"text"', 422),
        (b"null", 422),
        (b"[" * 100_000, 400),
        (b'{"hyperparameters": ' + b'{"a":' * 500 + b"1" + b"}" * 501, 422),
        (b'{"dataset_url": "https://a.example/d", "hyperparameters": {"x": NaN}}', 422),
        (b'{"dataset_url": "https://a.example/d", "hyperparameters": {"x": 1e999}}', 422),
        (b'{"dataset_url": "https://a.example/d", "hyperparameters": {"x": ' + b"9" * 5000 + b"}}", 400),
        (b'{"dataset_url": "https://a.example/d\\u0000"}', 422),
        (b'{"dataset_url": "https://a.example/d", "job_id": "\\ud800"}', 422),
        (b'{"dataset_url": "https://a.example/d", "hyperparameters": {"\\u0000": 1}}', 422),
        (b'{"dataset_url": "ftp://a.example/d"}', 422),
        (b'{"dataset_url": "file:///etc/passwd"}', 422),
        (b'{"dataset_url": "https://a.example/d", "callback_url": "javascript:alert(1)"}', 422),
        (b'{"job_id": ""}', 422),
        (b'{"job_id": "no-row-and-no-file"}', 422),
        (b'{"dataset_url": "https://a.example/d", "hyperparameters": {"base_model": "../../etc/passwd"}}', 422),
        (b'{"dataset_url": "https://a.example/d", "hyperparameters": "fast"}', 422),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_read_or_stored_is_refused(shared_client: httpx.Client, body: bytes, status: int) -> None:
    for path, sent in (("/training/submit", body), ("/run", b'{"input": ' + body + b"}")):
        answer = shared_client.post(path, content=sent)
        allowed = {status} if path == "/training/submit" else {status, 400}
        assert answer.status_code in allowed, (path, answer.text)
        assert answer.json()["error"]


@pytest.mark.parametrize(
    "attempt",
    [
        "'; DROP TABLE training_jobs; --", "%27%20OR%201=1", "..%2f..%2fetc%2fpasswd", "*", "%00", "null",
        "0" * 5000, "{00000000-0000-4000-8000-000000000000}", UNKNOWN, UNKNOWN.replace("-", ""),
    ],
)  # fmt: skip
def test_an_unknown_or_malicious_id_is_not_found(shared_client: httpx.Client, attempt: str) -> None:
    for method, path in (
        ("GET", "/training/status/"), ("POST", "/training/cancel/"), ("GET", "/status/"), ("POST", "/cancel/"),
    ):  # fmt: skip
        answer = shared_client.request(method, path + attempt)
        assert answer.status_code == 404 and answer.json()["error"], (path, answer.text)


def test_a_job_that_row_security_hides_is_not_said_to_be_unknown(client: httpx.Client, queue: Queue) -> None:
    job = str(queue.insert())
    queue.select("CREATE POLICY tenants ON training_jobs AS RESTRICTIVE USING (false)")
    for path in (f"/training/status/{job}", f"/status/{job}"):
        answer = client.get(path)
        assert answer.status_code == 503 and answer.headers["Retry-After"], (path, answer.text)
    assert client.post("/training/submit", json=GOOD | {"job_id": job}).status_code == 503
    assert client.get(f"/status/{UNKNOWN}").status_code == 404, "what is not there is not hidden"
    queue.select("DROP POLICY tenants ON training_jobs")
    assert client.get(f"/status/{job}").status_code == 200


def test_sql_in_a_submission_is_only_text(client: httpx.Client, queue: Queue) -> None:
    evil = "x'); DELETE FROM training_jobs; --"
    body = GOOD | {"job_id": evil, "hyperparameters": {evil: evil, "sample_prompts": [evil]}}
    job = client.post("/training/submit", json=body).json()["external_job_id"]
    with queue.connect() as connection:
        row = connection.execute(
            "SELECT client_job_id, hyperparameters FROM training_jobs WHERE id = %s", (job,)
        ).fetchone()
    assert row is not None and row["client_job_id"] == evil and row["hyperparameters"][evil] == evil


def test_a_huge_body_is_refused_before_it_has_arrived(gateway: Gateway) -> None:
    url = httpx.URL(gateway.url)
    head = f"POST /run HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    announced = (head + "Content-Length: 10000000000\r\n\r\n").encode()
    chunked = (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + b"10000\r\n" + b" " * 65536 + b"\r\n"
    for opening, more in ((announced, b""), (chunked, (b"10000\r\n" + b" " * 65536 + b"\r\n") * 17)):
        with socket.create_connection((url.host, url.port or 80), timeout=10) as connection:
            connection.sendall(opening + more)
            assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_a_body_that_never_ends_holds_nothing_up(gateway: Gateway, client: httpx.Client) -> None:
    url = httpx.URL(gateway.url)
    head = f"POST /run HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n".encode()
    slow = [socket.create_connection((url.host, url.port or 80), timeout=30) for _ in range(50)]
    for connection in slow:
        connection.sendall(head + b"{")
    assert client.get("/health").elapsed.total_seconds() < 2
    for connection in slow:
        assert connection.recv(64).startswith(b"HTTP/1.1 408")
        connection.close()


def test_a_thousand_parallel_requests_are_answered_and_a_running_jobs_heartbeats_keep_their_period(
    queue: Queue, tmp_path: Path
) -> None:
    """With the daemon's lease of 3 s a heartbeat is due each second; none may be older than a lease."""
    job = queue.insert(script=[["steps", 2000, 0.02]])

    async def storm(url: str) -> Counter[tuple[str, int]]:
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, limits=limits) as client:

            async def one(number: int) -> tuple[str, int]:
                match number % 5:
                    case 0:
                        return "submit", (
                            await client.post("/run", json={"input": GOOD | {"job_id": f"n{number}"}})
                        ).status_code
                    case 1:
                        return "status", (await client.get(f"/training/status/{job}")).status_code
                    case 2:
                        return "unknown", (await client.get(f"/status/{UNKNOWN}")).status_code
                    case 3:
                        return "broken", (await client.post("/training/submit", content=b"{")).status_code
                    case _:
                        wrong = {"Authorization": "Bearer wrong"}
                        return "stranger", (await client.get("/health", headers=wrong)).status_code

            return Counter(await asyncio.gather(*(one(number) for number in range(1000))))

    def heartbeat_age() -> float:
        with queue.connect() as connection:
            row = connection.execute(
                "SELECT extract(epoch FROM clock_timestamp() - heartbeat_at)::float8 AS age FROM training_leases"
            ).fetchone()
        assert row is not None
        return float(row["age"])

    async def watched(url: str) -> tuple[Counter[tuple[str, int]], list[float]]:
        running = asyncio.create_task(storm(url))
        ages = []
        while not running.done():
            ages.append(await asyncio.to_thread(heartbeat_age))
            await asyncio.wait({running}, timeout=0.1)
        return await running, ages

    with (
        Gateway(queue, tmp_path, gateway_requests_per_second=1000) as gateway,
        queue.daemon(tmp_path, slots=1) as daemon,
    ):
        queue.wait_for(job, "running")
        answers, ages = asyncio.run(watched(gateway.url))
        queue.cancel_as_owner(job)
        daemon.wait_for_log("attempt_settled", outcome="cancelled")
        assert not daemon.logged("lease_lost") and not daemon.logged("lease_not_renewed")
    statuses = {kind: {status for found, status in answers if found == kind} for kind, _ in answers}
    assert statuses["submit"] == {200} and statuses["status"] == {200} and statuses["unknown"] == {404}
    assert statuses["broken"] == {400} and statuses["stranger"] <= {401, 429}
    assert sum(answers.values()) == 1000
    assert max(ages) < 3.0, ages


def test_one_key_over_its_rate_is_told_when_to_come_back(queue: Queue, tmp_path: Path) -> None:
    with Gateway(queue, tmp_path, gateway_requests_per_second=2) as gateway, gateway.client() as client:
        answers = [client.get(f"/status/{UNKNOWN}") for _ in range(8)]
    assert [answer.status_code for answer in answers[:4]] == [404] * 4
    assert answers[-1].status_code == 429 and int(answers[-1].headers["Retry-After"]) >= 1


def test_without_a_service_user_only_callers_with_rows_are_served(queue: Queue, tmp_path: Path) -> None:
    job = queue.insert()
    with Gateway(queue, tmp_path, service_user_id="") as gateway, gateway.client() as client:
        assert client.post("/training/submit", json={"job_id": str(job)}).json() == {"external_job_id": str(job)}
        answer = client.post("/training/submit", json=GOOD)
    assert answer.status_code == 503 and "TRAINER_SERVICE_USER_ID" in answer.json()["hint"]


def test_a_service_user_who_does_not_exist_is_named_to_the_operator(queue: Queue, tmp_path: Path) -> None:
    with Gateway(queue, tmp_path, service_user_id=UNKNOWN) as gateway, gateway.client() as client:
        answer = client.post("/training/submit", json=GOOD)
    assert answer.status_code == 503 and "TRAINER_SERVICE_USER_ID" in answer.json()["hint"]


def test_a_gateway_without_keys_or_with_a_short_one_does_not_start(queue: Queue, tmp_path: Path) -> None:
    for keys in ("", "short"):
        with Gateway(queue, tmp_path, gateway_keys=keys) as gateway:
            assert gateway.wait() == 78
        assert "TRAINER_GATEWAY_KEYS" in gateway.tail()


def test_a_port_that_is_taken_is_said_and_not_tried_again(gateway: Gateway, queue: Queue, tmp_path: Path) -> None:
    port = httpx.URL(gateway.url).port
    (tmp_path / "second").mkdir()
    with Gateway(queue, tmp_path / "second", gateway_port=port) as second:
        assert second.wait() == 78
    assert "TRAINER_GATEWAY_PORT" in second.tail()


def test_term_answers_who_waits_and_ends_with_zero(queue: Queue, tmp_path: Path) -> None:
    with Gateway(queue, tmp_path) as gateway, gateway.client() as client:
        assert client.get("/healthz").status_code == 200

        async def wait_and_end() -> httpx.Response:
            headers = {"Authorization": f"Bearer {KEY}"}
            async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=30) as caller:
                asked = asyncio.create_task(caller.post("/runsync", json={"input": GOOD}))
                await asyncio.to_thread(gateway.wait_for_log, "job_submitted")
                gateway.signal(signal.SIGTERM)
                return await asked

        answer = asyncio.run(wait_and_end())
        assert answer.status_code == 200 and answer.json()["status"] == "IN_QUEUE"
        assert gateway.wait() == 0


def test_a_gateway_whose_database_is_away_says_so_and_recovers(queue: Queue, tmp_path: Path, postgres: Server) -> None:
    """Refused for a while, as at a failover: connections are ended and no new one is let in."""
    with queue.connect() as connection:
        name = connection.info.dbname
    with (
        psycopg.connect(postgres.url, autocommit=True) as admin,
        Gateway(queue, tmp_path) as gateway,
        gateway.client() as client,
    ):
        assert client.get("/readyz").status_code == 200
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        eventually(lambda: client.get("/readyz").status_code == 503)
        assert client.get(f"/status/{UNKNOWN}").status_code == 503
        assert client.get("/healthz").status_code == 200
        assert "trainer_database_up 0.0" in client.get("/metrics").text
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true".encode())
        eventually(lambda: client.get("/readyz").status_code == 200)


def test_the_gateway_stays_small(gateway: DaemonProcess) -> None:
    gateway.wait_for_log("gateway_started")
    resident = int(Path(f"/proc/{gateway.pid}/statm").read_text().split()[1]) * 4096 / 2**20
    assert resident < 130
