"""Watching: a picture on a terminal, lines in a pipe, and an exit status that a script can go by."""

from __future__ import annotations

import json
import signal
from typing import Any

from tests.cli.command import CommandLine
from tests.daemon_process import eventually
from tests.lifecycle.queue import Queue

PLAN: list[Any] = [
    "say",
    "planned",
    {
        "total_steps": 60,
        "total_epochs": 1,
        "train_examples": 20,
        "validation_examples": 2,
        "train_tokens": 900,
        "trained_tokens": 400,
        "max_length": 64,
    },
]
FAILURE: list[Any] = [
    "say",
    "failed",
    {"code": "non_finite_loss", "message": "The loss is not a number.", "hint": "Choose a lower learning_rate."},
]


def test_a_watched_job_that_completes_ends_the_watch_with_success(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert(script=[PLAN, ["steps", 60, 0.03]])
    process = cli.start("watch", job)
    try:
        assert process.stdout is not None
        first = ""
        while "waits:" not in first and (line := process.stdout.readline()):
            first += line
        with queue.daemon(queue.folder):
            out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(10)
    assert "waits: no worker" in first + out and "A host has claimed the job" in out, first + out
    assert "step 60 of 60" in out or "completed" in out
    assert "✓" in out.splitlines()[-1]
    assert "download" in out.splitlines()[-1]
    assert process.returncode == 0, err


def test_a_watched_job_that_fails_says_why_and_what_to_do(cli: CommandLine, queue: Queue) -> None:
    good, bad = queue.insert(), queue.insert(script=[["steps", 2, 0.01], FAILURE, ["exit", 1]])
    with queue.daemon(queue.folder, slots=2):
        said = cli.run("watch", good, bad)
    assert said.status == 1
    assert f"✓ {str(good)[:8]} completed" in said.out
    assert f"✗ {str(bad)[:8]} failed: The loss is not a number." in said.out
    assert "→ Choose a lower learning_rate." in said.out


def test_a_program_reads_every_change_as_json(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert(script=[["steps", 40, 0.03]])
    with queue.daemon(queue.folder):
        said = cli.ok("watch", job, "--json")
    assert {"event", "job"} == {key for line in said.lines for key in line}
    states = [line["job"]["state"] for line in said.lines if "job" in line]
    assert states[-1] == "completed"
    steps = [line["job"]["step"] for line in said.lines if "job" in line]
    assert steps == sorted(steps)


def test_a_terminal_shows_the_curve_grow(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert(script=[PLAN, ["steps", 60, 0.1]])
    with queue.daemon(queue.folder), cli.terminal("watch", job, columns=80) as terminal:
        terminal.wait_for("loss ")
        terminal.wait_for("of 60")
        assert terminal.wait() == 0
    assert any(0x2800 < ord(letter) < 0x2900 for letter in terminal.screen), "no dot of a curve"
    assert "completed in" in terminal.screen


def test_many_jobs_share_a_small_terminal(cli: CommandLine, queue: Queue) -> None:
    jobs = [queue.insert() for _ in range(9)]
    with cli.terminal("watch", columns=80, rows=24) as terminal:
        terminal.wait_for("more jobs: ")
        terminal.wait_for("no worker")
        cli.ok("cancel", *jobs)
        assert terminal.wait() == 1
    assert terminal.screen.count("cancelled\r\n") >= 9


def test_stopping_to_watch_stops_nothing_else(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert()
    with cli.terminal("watch", job) as terminal:
        terminal.wait_for("queued")
        terminal.interrupt()
        assert terminal.wait() == 130
        assert "the jobs go on" in terminal.screen
    assert queue.row(job)["status"] == "queued"


def test_a_watch_outlives_its_database_connection(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert()
    process = cli.start("watch", job, "--json")

    def cut() -> bool:
        with queue.connect() as connection:
            rows = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'brightrun-trainer cli' AND datname = current_database()"
            ).fetchall()
        return bool(rows)

    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())
        eventually(cut)
        cli.ok("cancel", job)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait(10)
    assert "trying again" in err
    assert json.loads(out.splitlines()[-1])["job"]["state"] == "cancelled"
    assert process.returncode == 1


def test_following_ends_quietly_when_its_reader_goes(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert()
    process = cli.start("watch", job)
    try:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait(10)


def test_with_nothing_unfinished_there_is_nothing_to_watch(cli: CommandLine) -> None:
    assert "no job is unfinished" in cli.ok("watch").out
