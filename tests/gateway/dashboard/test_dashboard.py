"""The dashboard without a browser: who gets in, what the stream tells, what a move does, what is served."""

from __future__ import annotations

import random
import re
import signal
import time
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest

from daemon.gateway.access.sessions import SESSION_SECONDS, Sessions
from tests.daemon_process import eventually
from tests.gateway.conftest import KEY, Gateway
from tests.gateway.dashboard.seeded_world import open_world, seed
from tests.gateway.watching import HEADERS, Watcher, sign_in
from tests.lifecycle.queue import Queue
from tests.paths import ROOT

STATIC = ROOT / "daemon" / "gateway" / "dashboard" / "static"
WRITES = 10
OTHER_KEY = "another-key-of-this-test-0123456789"


# -- who gets in ----------------------------------------------------------------------------------------------------


def test_the_page_is_served_to_anybody_and_holds_no_data(shared_client: httpx.Client) -> None:
    with httpx.Client(base_url=shared_client.base_url) as stranger:
        front = stranger.get("/")
        assert front.status_code == 307 and front.headers["location"] == "/dashboard"
        page = stranger.get("/dashboard")
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        for path in ("/dashboard/session", "/dashboard/stream", f"/dashboard/jobs/{uuid4()}"):
            assert stranger.get(path).status_code == 401, path
        assert stranger.post(f"/dashboard/jobs/{uuid4()}/cancel", headers=HEADERS).status_code == 401


def test_the_page_may_load_and_run_nothing_but_its_own_files(shared_client: httpx.Client) -> None:
    page = shared_client.get("/dashboard")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["trusted-types"] == "'none'" and policy["require-trusted-types-for"] == "'script'"
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\son[a-z]+=|\sstyle=", page.text)
    for path in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert shared_client.get(path).status_code == 200, path


@pytest.mark.parametrize("script", sorted(STATIC.glob("*.js")), ids=lambda path: path.name)
def test_a_script_of_ours_never_makes_markup_of_text(script: Path) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|setHTML"
    assert not re.search(forbidden, script.read_text())


def test_files_outside_the_static_folder_are_not_served(shared_client: httpx.Client) -> None:
    for name in ("../feed.py", "%2e%2e/feed.py", "..%2ffeed.py", "vendor", "", "nothing.js"):
        assert shared_client.get(f"/dashboard/static/{name}").status_code in (401, 404), name


def test_a_file_that_is_known_is_not_sent_again(shared_client: httpx.Client) -> None:
    first = shared_client.get("/dashboard/static/main.js")
    again = shared_client.get("/dashboard/static/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content


def test_a_key_opens_a_session_whose_cookie_no_script_can_read(shared_client: httpx.Client) -> None:
    url = str(shared_client.base_url)
    with sign_in(url) as client:
        assert client.get("/dashboard/session").status_code == 204
        # The cookie belongs to the page: the gateway's contract still asks for the key.
        assert client.get("/health").status_code == 401
    answer = httpx.post(f"{url}/dashboard/login", json={"key": KEY}, headers=HEADERS | {"X-Forwarded-Proto": "https"})
    cookie = answer.headers["set-cookie"].lower()
    for flag in ("httponly", "samesite=strict", "path=/dashboard", "secure", f"max-age={SESSION_SECONDS}"):
        assert flag in cookie
    assert KEY not in cookie


def test_who_signs_out_takes_every_copy_of_the_cookie_along(shared_client: httpx.Client) -> None:
    url = str(shared_client.base_url)
    with sign_in(url) as client, sign_in(url) as other, Watcher(url, cookies=client.cookies) as watcher:
        watcher.snapshot()
        copy = {"Cookie": f"trainer_session={client.cookies['trainer_session']}"}
        assert client.post("/dashboard/logout").status_code == 204
        assert "trainer_session" not in client.cookies
        assert httpx.get(f"{url}/dashboard/session", headers=copy).status_code == 401
        # What streams to the copy ends, too: with the next word, a beat every five seconds.
        assert watcher.ended.wait(30)
        assert other.get("/dashboard/session").status_code == 204


def test_a_wrong_key_opens_nothing(shared_client: httpx.Client) -> None:
    answer = httpx.post(f"{shared_client.base_url}/dashboard/login", json={"key": "x" * 32}, headers=HEADERS)
    assert answer.status_code == 401 and "set-cookie" not in answer.headers
    assert set(answer.json()) == {"error", "hint"}


@pytest.mark.parametrize("headers", [{}, HEADERS | {"Sec-Fetch-Site": "cross-site"}])
def test_another_site_cannot_make_a_browser_write(shared_client: httpx.Client, headers: dict[str, str]) -> None:
    with sign_in(str(shared_client.base_url)) as client:
        cookie = {"Cookie": f"trainer_session={client.cookies['trainer_session']}"}
        for path in ("login", "logout", f"jobs/{uuid4()}/cancel", f"jobs/{uuid4()}/retry"):
            answer = httpx.post(
                f"{shared_client.base_url}/dashboard/{path}", headers=headers | cookie, json={"key": KEY}
            )
            assert answer.status_code == 403, path


def test_a_session_ends_with_its_time_and_with_its_key() -> None:
    now = [1_000_000.0]
    sessions = Sessions([KEY, OTHER_KEY], clock=lambda: now[0])
    mine, other = sessions.open(0), sessions.open(1)
    assert (sessions.find(mine), sessions.find(other)) == (0, 1)
    assert Sessions([OTHER_KEY], clock=lambda: now[0]).find(mine) is None
    until, number, signature = mine.split(".")
    for forged in (
        f"{int(until) + 1}.{number}.{signature}",
        f"{until}.{number[::-1]}.{signature}",
        f"{until}.{number}.{signature[:-1]}",
        f"{until}.{number}",
        until,
        "",
        "x.y",
        "1" * 400,
        "²." + "é",
    ):
        assert sessions.find(forged) is None
    again = sessions.open(0)
    sessions.end(mine)
    sessions.end("nobody's")
    assert sessions.find(mine) is None and sessions.find(again) == 0
    now[0] += SESSION_SECONDS + 1
    assert sessions.find(again) is None


# -- what the stream tells ------------------------------------------------------------------------------------------


def test_a_browser_is_told_of_a_job_from_its_insert_to_its_end(queue: Queue, gateway: Gateway, tmp_path: Path) -> None:
    with Watcher(gateway.url) as watcher:
        assert watcher.snapshot()["jobs"] == []
        job = queue.insert(script=[["steps", 120, 0.03]])
        watcher.wait_for_job(job, state="queued", model="tiny", dataset="A dataset")
        reason = watcher.wait(lambda told: [str(job), "no worker"] in told.data.get("queue", {}).get("order", []))
        assert reason.data["queue"]["waiting"] == 1
        with queue.daemon(tmp_path, metrics_points=0):
            watcher.wait(
                lambda told: [worker["state"] for worker in told.data.get("workers", [])] in (["idle"], ["busy"])
            )
            watcher.wait_for_job(job, state="running")
            grown = watcher.wait(lambda told: len(told.data.get("points", {}).get(str(job), [])) > 0)
            step, loss = grown.data["points"][str(job)][0]
            assert loss == pytest.approx(3.0 / (1 + step))
            done = watcher.wait_for_job(job, state="completed")
        story = [event["kind"] for told in watcher.told for event in told.data.get("story", [])]
        assert [kind for kind in story if kind in ("queued", "claimed", "started", "completed")] == [
            "queued", "claimed", "started", "completed",
        ]  # fmt: skip
        watcher.wait(lambda told: told.data.get("day", {}).get("completed") == 1)
    # Points are exact: those of the stream stand in the rows, each once, in order.
    points = [point for told in watcher.told for point in told.data.get("points", {}).get(str(job), [])]
    rows = {row["step"]: float(row["training_loss"]) for row in queue.points(job)}
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert all(rows[step] == pytest.approx(loss, abs=1e-5) for step, loss in points)
    assert done.number


def test_two_hundred_jobs_are_listed_with_their_curves(queue: Queue, gateway: Gateway) -> None:
    named = seed(queue.dsn)
    with Watcher(gateway.url) as watcher:
        told = watcher.snapshot()
    states = [job["state"] for job in told["jobs"]]
    assert len(states) == 200 and states.count("running") == 10
    assert told["queue"]["waiting"] == 90 and len(told["queue"]["order"]) == 90
    assert {reason for _, reason in told["queue"]["order"]} >= {"all workers busy", "no worker has 8 GPUs", "scheduled"}
    assert len(told["workers"]) == 3 and told["day"]["failed"] > 0
    curve = told["curves"][str(named["running0"])]
    steps = [step for step, _ in curve["points"]]
    assert steps == sorted(steps) and steps[-1] == 297 and 100 < len(steps) <= 320
    assert [step for step, _ in curve["validation"]] == [40, 80, 120, 160, 200, 240, 280]


def test_many_browsers_cost_the_database_what_one_costs(queue: Queue, gateway: Gateway) -> None:
    """One LISTEN connection and one reader for all; a bounded number of transactions a second; none while unwatched."""
    named = seed(queue.dsn)

    def connections() -> dict[str, int]:
        rows = queue.select(
            "SELECT application_name AS name, count(*)::int AS many FROM pg_stat_activity "
            "WHERE datname = current_database() GROUP BY 1"
        )
        return {row["name"]: row["many"] for row in rows}

    def transactions() -> int:
        return int(
            queue.select(
                "SELECT pg_stat_clear_snapshot(), xact_commit FROM pg_stat_database WHERE datname = current_database()"
            )[0]["xact_commit"]
        )

    watchers = [Watcher(gateway.url) for _ in range(5)]
    try:
        for watcher in watchers:
            watcher.__enter__()
        for watcher in watchers:
            watcher.snapshot()
        counted, begun = transactions(), time.monotonic()
        delays = []
        with psycopg.connect(queue.dsn, autocommit=True) as trainer:
            trainer.execute("SET session_replication_role = replica")
            for turn in range(WRITES):
                # Not in step with the reader's looks.
                time.sleep(random.uniform(0, 0.5))
                job, step = named[f"running{turn % 10}"], 10_000 + turn
                places = [len(watcher.told) for watcher in watchers]
                trainer.execute("UPDATE training_jobs SET current_step = %s WHERE id = %s", (step, job))
                committed = time.monotonic()
                delays += [
                    watcher.wait_for_job(job, after=place, step=step).at - committed
                    for watcher, place in zip(watchers, places, strict=True)
                ]
        seconds = time.monotonic() - begun
        # Statistics are published within a second or so; what came later only makes the bound harder.
        rate = (transactions() - counted) / seconds
        delays = sorted(round(1000 * delay) for delay in delays)
        print(f"\n5 browsers: {rate:.1f} transactions/s, of which {WRITES / seconds:.1f} are writes; "
              f"change to browser: median {delays[len(delays) // 2]} ms, slowest {delays[-1]} ms")  # fmt: skip
        assert connections()["brightrun-trainer dashboard"] == 1
        assert connections()["brightrun-trainer listener"] == 1
        # Four looks a second at most, the hosts, the queue, the reaper, the writes of this test.
        assert rate < 12
        assert delays[-1] < 10_000
    finally:
        for watcher in watchers:
            watcher.__exit__()
    eventually(
        lambda: not {"brightrun-trainer dashboard", "brightrun-trainer listener"} & set(connections()),
        seconds=40,
        why=lambda: str(connections()),
    )


def test_a_browser_that_comes_back_is_told_what_it_missed(queue: Queue, gateway: Gateway) -> None:
    with Watcher(gateway.url) as stays:
        stays.snapshot()
        with Watcher(gateway.url) as leaves:
            first = queue.insert()
            seen = leaves.wait_for_job(first)
        second = queue.insert()
        stays.wait_for_job(second)
        with Watcher(gateway.url, last_event_id=seen.number) as back:
            back.wait_for_job(second)
            assert all(told.event != "snapshot" for told in back.told)
        for unknown in ("elsewhere-1", f"{seen.number}99999", "-", "x"):
            with Watcher(gateway.url, last_event_id=unknown) as stranger:
                assert {job["job_id"] for job in stranger.snapshot()["jobs"]} == {str(first), str(second)}


@pytest.mark.system
def test_a_change_that_leaves_no_trace_is_found_by_the_next_whole_look(queue: Queue, gateway: Gateway) -> None:
    kept, deleted = queue.insert(), queue.insert()
    with Watcher(gateway.url) as watcher:
        watcher.snapshot()
        queue.select("UPDATE training_jobs SET priority = 7 WHERE id = %s", kept)
        queue.select("DELETE FROM training_jobs WHERE id = %s", deleted)
        watcher.wait_for_job(kept, priority=7, seconds=60)
        watcher.wait(lambda told: str(deleted) in told.data.get("gone", []), seconds=60)


def test_streams_end_at_once_when_the_gateway_is_asked_to_end(gateway: Gateway) -> None:
    with Watcher(gateway.url) as watcher:
        watcher.snapshot()
        asked = time.monotonic()
        gateway.signal(signal.SIGTERM)
        assert gateway.wait(30) == 0
        # uvicorn's grace for answers under way is ten seconds; a loaded machine takes its time for the rest.
        assert watcher.ended.wait(20) and time.monotonic() - asked < 9
    assert not gateway.logged("gateway_broke"), gateway.tail()


# -- a job whole, and its moves -------------------------------------------------------------------------------------


def test_a_job_is_shown_whole_and_its_adapter_can_be_fetched(queue: Queue, gateway: Gateway, tmp_path: Path) -> None:
    job = queue.insert(
        script=[
            ["say", "sample", {"when": "before", "prompt": "Why?", "answer": "I do not know."}],
            ["steps", 20, 0.01],
            ["say", "sample", {"when": "after", "prompt": "Why?", "answer": "Because of the tide."}],
        ]
    )
    with queue.daemon(tmp_path), sign_in(gateway.url) as client:
        row = queue.wait_for(job, "completed")
        whole = client.get(f"/dashboard/jobs/{job}").json()
        assert whole["job"]["state"] == "completed" and whole["job"]["adapter_sha256"] == row["adapter_sha256"]
        assert [e["data"]["answer"] for e in whole["story"] if e["kind"] == "sample"][-1] == "Because of the tide."
        assert [step for step, _ in whole["curve"]["points"]] == list(range(1, 21))
        fetched = client.get(f"/dashboard/jobs/{job}/files/archive")
        assert fetched.status_code == 200 and len(fetched.content) == row["adapter_bytes"]
        assert fetched.headers["content-disposition"].startswith("attachment; filename=")
        for name in ("nothing", "../archive", "ARCHIVE", "archive%00"):
            assert client.get(f"/dashboard/jobs/{job}/files/{name}").status_code in (404, 405, 422), name


def test_a_job_is_cancelled_and_tried_again(queue: Queue, gateway: Gateway) -> None:
    job = queue.insert()
    with sign_in(gateway.url) as client:
        refused = client.post(f"/dashboard/jobs/{job}/retry")
        assert refused.status_code == 409 and "queued" in refused.json()["error"]
        assert client.post(f"/dashboard/jobs/{job}/cancel").status_code == 204
        assert queue.row(job)["status"] == "cancelled"
        assert client.post(f"/dashboard/jobs/{job}/retry").status_code == 204
        assert queue.row(job)["status"] == "queued" and queue.row(job)["attempt"] == 0
        assert client.post(f"/dashboard/jobs/{uuid4()}/cancel").status_code == 404
        assert client.post(f"/dashboard/jobs/{job}/delete").status_code == 422
        assert client.get(f"/dashboard/jobs/{uuid4()}").status_code == 404


def test_numbers_that_json_does_not_have_break_neither_stream_nor_page(queue: Queue, gateway: Gateway) -> None:
    with open_world(queue.dsn) as world:
        host = world.add_host("odd", 1, "H100", float("nan"), 1)
        job = world.train(host, 0.5, "tiny", "odd", 40, 100.0)
        world.insert(
            "metrics_points", job_id=job, epoch=0, step=999, training_loss=float("nan"),
            validation_loss=float("nan"), learning_rate=0,
        )  # fmt: skip
    with Watcher(gateway.url) as watcher, sign_in(gateway.url) as client:
        assert watcher.snapshot()["workers"][0]["gpu_memory_gb"] is None
        assert client.get(f"/dashboard/jobs/{job}").json()["curve"]["points"][-1] == [999, None]
