"""The words that print lines for people print JSON for programs: logs, migrate, demo."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

import pytest

from daemon.demo.json_screen import JsonScreen
from daemon.errors import EXIT_UNFIT
from daemon.job_view.watched_jobs import WatchedJobs
from tests.cli.command import CommandLine
from tests.lifecycle.queue import Queue
from tests.postgres import AppDatabase


def test_logs_come_as_one_object_a_line(cli: CommandLine) -> None:
    job = uuid4()
    log = Path(cli.environment["TRAINER_WORK_DIR"]) / str(job) / "attempts" / "e1-0a1b2c3d" / "trainer.log"
    log.parent.mkdir(parents=True)
    log.write_text('one\n"two"\n')
    assert cli.ok("logs", job, "--json").lines == [{"line": "one"}, {"line": '"two"'}]


def test_migrate_lists_what_it_applied(cli: CommandLine) -> None:
    assert cli.ok("migrate", "--json").lines == [{"applied": [], "repaired": [], "warnings": []}]


def test_migrate_refuses_what_it_cannot_serve_line_by_line(cli: CommandLine, database: AppDatabase) -> None:
    database.run("ALTER TABLE training_jobs ALTER error_stack TYPE varchar(9), ALTER retry_count TYPE smallint")
    said = cli.run("migrate")
    assert said.status == EXIT_UNFIT and said.out == ""
    columns = [line.split()[0] for line in said.err.splitlines()[1:]]
    assert columns == ["training_jobs.error_stack", "training_jobs.retry_count"]


def test_a_demo_that_cannot_begin_says_so_in_json(cli: CommandLine) -> None:
    said = cli.run("demo", "--json", "--data", "nowhere.jsonl")
    assert said.status == 1
    assert [line["kind"] for line in said.lines] == ["failure"] and "nowhere.jsonl" in said.lines[0]["text"]


def test_a_demo_tells_each_event_once_and_the_row_when_it_changed(
    capsys: pytest.CaptureFixture[str], queue: Queue
) -> None:
    job = queue.insert()
    jobs = WatchedJobs([job])
    with queue.connect() as read, JsonScreen().view() as view:
        for _ in range(2):
            news = jobs.read(read)
            view.show(jobs.all, news, None)
        queue.cancel_as_owner(job)
        news = jobs.read(read)
        view.show(jobs.all, news, None)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["event", "job", "event", "job"]
    assert [line["event"]["kind"] for line in lines if "event" in line] == ["queued", "cancelled"]
    assert [line["job"]["state"] for line in lines if "job" in line] == ["queued", "cancelled"]
