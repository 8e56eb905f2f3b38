"""Jobs looked at and moved from the command line, by a real process on a real Postgres."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest

from tests.cli.command import CommandLine
from tests.lifecycle.queue import Queue


def test_jobs_are_listed_with_the_reason_why_each_waits(cli: CommandLine, queue: Queue) -> None:
    due = queue.insert()
    later = queue.insert(run_after_seconds=3600)
    said = cli.ok("jobs")
    assert str(due)[:8] in said.out
    assert "no worker" in said.out
    assert "scheduled" in said.out
    rows = {row["job_id"]: row for row in cli.ok("jobs", "--json").lines}
    assert rows[str(later)]["waiting_reason"] == "scheduled"
    assert rows[str(due)]["state"] == "queued"


def test_every_column_that_one_decides_by_survives_a_narrow_terminal(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert(hyperparameters={"base_model": "Qwen/Qwen3-Next-80B-A3B-Instruct"})
    for columns in (60, 80, 140):
        said = cli.ok("jobs", COLUMNS=str(columns))
        assert max(map(len, said.out.splitlines())) <= columns
        assert str(job)[:8] in said.out
        assert "● queued" in said.out
        assert "no worker" in said.out


def test_filters_choose_by_state_owner_and_model(cli: CommandLine, queue: Queue) -> None:
    queue.insert(hyperparameters={"base_model": "Qwen/Qwen3-8B"})
    other = queue.insert()
    cli.ok("cancel", other)
    assert [row["job_id"] for row in cli.ok("jobs", "-s", "cancelled", "--json").lines] == [str(other)]
    assert [row["model"] for row in cli.ok("jobs", "--model", "qwen3", "--json").lines] == ["Qwen/Qwen3-8B"]
    assert len(cli.ok("jobs", "--user", f"{queue.user_id}@example.test", "--json").lines) == 2
    assert cli.ok("jobs", "--user", "00000000-0000-0000-0000-000000000001").out == "no job matches\n"
    unknown = cli.run("jobs", "--state", "dead")
    assert (unknown.status, "one of queued, initializing" in unknown.err) == (2, True)


def test_the_first_four_characters_name_a_job_while_they_name_one_only(cli: CommandLine, queue: Queue) -> None:
    for job in ("abcd1111-0000-4000-8000-000000000001", "abcd2222-0000-4000-8000-000000000002"):
        queue.insert(id=UUID(job))
    assert "abcd1111-0000" in cli.ok("show", "ABCD1").out
    several = cli.run("show", "abcd")
    assert several.status == 2
    assert "begins several ids" in several.err
    assert cli.run("show", "abc").status == 2
    assert "There is no job ffff0000" in cli.run("show", "ffff0000").err
    assert cli.run("show", "'; DROP TABLE x").status == 2


def test_what_strangers_wrote_is_shown_and_never_obeyed(cli: CommandLine, queue: Queue) -> None:
    evil = "\x1b[2J\x1b]0;owned\x07[bold red]\u202e"
    job = queue.insert(hyperparameters={"base_model": f"x{evil}", f"key{evil}": evil}, client_job_id=f"id{evil}")
    with queue.connect() as connection:
        connection.execute("UPDATE datasets SET name = %s", (f"data{evil}",))
        connection.execute(
            "INSERT INTO training_events (job_id, kind, message, data) VALUES (%s, 'notice', %s, '{}'), "
            "(%s, 'sample', '', jsonb_build_object('when', 'before', 'prompt', %s::text, 'answer', %s::text))",
            (job, f"note{evil}", job, f"asked{evil}", f"said{evil}"),
        )
    for words in (("jobs",), ("show", job), ("events", job)):
        said = cli.ok(*words)
        assert "\x1b" not in said.out
        assert "\u202e" not in said.out
        assert "[bold red]" in said.out
    with cli.terminal("show", job) as terminal:
        assert terminal.wait() == 0
        assert "\x1b[2J" not in terminal.screen
        assert "\x1b]0;" not in terminal.screen


def test_a_job_is_shown_whole(cli: CommandLine, queue: Queue) -> None:
    sample = {"prompt": "Why do cats purr?", "answer": "I do not know."}
    failure = {"code": "out_of_memory", "message": "The card is full.", "hint": "Reduce batch_size (current 4)."}
    script = [
        ["say", "sample", sample | {"when": "before"}],
        ["steps", 3, 0.01],
        ["say", "failed", failure],
        ["exit", 1],
    ]
    job = queue.insert(script=script, hyperparameters={"base_model": "tiny", "lora_rank": 8})
    with queue.daemon(queue.folder):
        queue.wait_for(job, "failed")
    said = cli.ok("show", str(job)[:6])
    for words in (
        "out_of_memory",
        "The card is full.",
        "→ Reduce batch_size",
        "I do not know.",
        "claimed",
    ):
        assert words in said.out
    # What was asked for beside what was used.
    settings = [re.split(r"\s{2,}", line.strip()) for line in said.out.splitlines()]
    assert ["base_model", "tiny", "tiny"] in settings and ["lora_rank", "8", "–"] in settings
    whole = cli.ok("show", job, "--json").lines[0]
    assert whole["error_code"] == "out_of_memory"
    assert whole["hyperparameters"] == {"base_model": "tiny", "lora_rank": 8}
    assert whole["story"][0]["kind"] == "queued"
    assert "failed: The card is full." in cli.ok("events", job).out


def test_events_are_followed_until_the_job_ends(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert(script=[["steps", 30, 0.02]])
    process = cli.start("events", "-f", job)
    try:
        with queue.daemon(queue.folder):
            out, _err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == 0
    assert out.splitlines()[-1].split("  ", 1)[1].startswith("Completed")


def test_cancel_and_retry_move_a_job_and_say_why_they_cannot(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert()
    assert cli.run("retry", job).status == 1
    assert f"{job} cancelled" in cli.ok("cancel", str(job)[:8]).out
    assert cli.ok("cancel", job, "--json").lines[0]["state"] == "cancelled"
    cli.ok("retry", job)
    assert queue.row(job)["status"] == "queued"
    refused = cli.run("retry", job)
    assert refused.status == 1
    assert "the job is queued" in refused.err
    assert "→ Only a failed or cancelled job" in refused.err


def test_a_mistyped_id_among_several_moves_none(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert()
    assert cli.run("cancel", job, "ffff0000").status == 2
    assert queue.row(job)["status"] == "queued"


def test_held_jobs_are_released(cli: CommandLine, queue: Queue) -> None:
    assert cli.ok("release-held").out == "no job is held\n"
    job = queue.insert()
    with queue.connect() as connection, connection.transaction():
        connection.execute("ALTER TABLE training_jobs DISABLE TRIGGER USER")
        connection.execute("UPDATE training_jobs SET held = true, due = false WHERE id = %s", (job,))
        connection.execute("ALTER TABLE training_jobs ENABLE TRIGGER USER")
    assert "1 held job released" in cli.ok("release-held").out
    assert queue.row(job)["due"]


def test_a_login_without_rights_is_told_in_one_line(cli: CommandLine, queue: Queue) -> None:
    with queue.connect() as connection:
        connection.execute("DROP ROLE IF EXISTS cli_stranger")
        connection.execute("CREATE ROLE cli_stranger LOGIN PASSWORD 'hunter2hunter2'")
    try:
        place = queue.dsn.rpartition("@")[2]
        said = cli.run("jobs", DATABASE_URL=f"postgresql://cli_stranger:hunter2hunter2@{place}")
        assert said.status == 1
        assert "This login lacks a right" in said.err
        assert "hunter2" not in said.err
    finally:
        with queue.connect() as connection:
            connection.execute("DROP ROLE cli_stranger")


@pytest.mark.parametrize(
    ("url", "status", "words"),
    [
        ("", 78, "DATABASE_URL is not set"),
        ("mysql://x", 78, "must begin with postgresql://"),
        ("postgresql://me:s3cret-word@127.0.0.1:9/x", 1, "The database does not answer"),
        ("postgresql://me:s3cret-word@127.0.0.1:9/x?nonsense=1", 78, "parameter that no driver knows"),
    ],
)
def test_a_wrong_database_url_is_named_and_never_echoed(tmp_path: Path, url: str, status: int, words: str) -> None:
    said = CommandLine(tmp_path, DATABASE_URL=url).run("jobs")
    assert said.status == status
    assert words in said.err
    assert "s3cret" not in said.err
    assert len(said.err.splitlines()) <= 2


def test_reading_asks_for_no_setting_but_the_database(cli: CommandLine, queue: Queue) -> None:
    queue.insert()
    bare = CommandLine(queue.folder, DATABASE_URL=queue.dsn, SUPABASE_URL="https://x.supabase.co")
    assert len(bare.ok("jobs", "--json").lines) == 1


def test_a_shell_completes_words_and_states(cli: CommandLine) -> None:
    as_installed = "import sys; sys.argv[:] = ['brightrun-trainer']; from daemon.__main__ import main; main()"

    def completed(words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", as_installed],
            env=cli.environment
            | {
                "_BRIGHTRUN_TRAINER_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout.split()

    assert {"release-held", "retry", "run"} <= set(completed("brightrun-trainer r"))
    assert completed("brightrun-trainer jobs --state ca") == ["cancelled"]
