"""Hosts looked at and emptied from anywhere, and the trainer's log on the host that has it."""

from __future__ import annotations

from tests.cli.command import CommandLine
from tests.daemon_process import eventually
from tests.lifecycle.queue import Queue


def test_a_drained_host_finishes_its_job_claims_no_other_and_ends(cli: CommandLine, queue: Queue) -> None:
    assert cli.run("drain").status == 2
    gate = queue.folder / "gate"
    first = queue.insert(script=[["steps", 260, 0.05, str(gate)]])
    with queue.daemon(queue.folder) as daemon:
        queue.wait_for(first, "running")
        (row,) = cli.ok("workers", "--json").lines
        assert row["jobs"] == [str(first)]
        assert "ends after 1 job" in cli.ok("drain", row["worker_id"][:6]).out
        assert "● draining" in cli.ok("workers", COLUMNS="80").out
        second = queue.insert()
        # It reads the order with its next sign of life.
        daemon.wait_for_log("worker_draining")
        gate.touch()
        assert daemon.wait(60) == 0
    assert queue.row(first)["status"] == "completed"
    assert queue.row(second)["status"] == "queued"
    assert cli.ok("workers", "--json").out == ""
    assert [row["state"] for row in cli.ok("workers", "--all", "--json").lines] == ["gone"]


def test_a_host_is_named_unmistakably_or_not_at_all(cli: CommandLine, queue: Queue) -> None:
    with queue.connect() as connection:
        for _ in range(2):
            connection.execute(
                "INSERT INTO training_workers (id, host, device) VALUES (gen_random_uuid(), 'pod-a', 'cuda')"
            )
    said = cli.run("drain", "pod-a")
    assert said.status == 2
    assert "Several hosts could be meant" in said.err
    assert "No live host is called pod-b" in cli.run("drain", "pod-b").err
    with queue.connect() as connection:
        assert connection.execute("SELECT count(*) AS n FROM training_workers WHERE drain").fetchone() == {"n": 0}


def test_a_running_job_s_log_is_followed_on_its_host(cli: CommandLine, queue: Queue) -> None:
    script = [["print", "loading \x1b[31mweights"], ["steps", 30, 0.05], ["print", "the last word"], ["steps", 32, 0.5]]
    job = queue.insert(script=script)
    with queue.daemon(queue.folder) as daemon:
        daemon.wait_for_log("job_claimed")
        eventually(lambda: list((queue.folder / "jobs" / str(job)).glob("attempts/e*/trainer.log")))
        process = cli.start("logs", "-f", str(job)[:8])
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
            process.wait(10)
    assert process.returncode == 0, err
    assert out.splitlines() == ["loading ␛[31mweights", "the last word"]
    said = cli.run("logs", job)
    assert said.status == 1
    assert "its work folder is gone" in said.err


def test_a_log_that_is_elsewhere_is_said_to_be_there(cli: CommandLine, queue: Queue) -> None:
    job = queue.insert(script=[["steps", 200, 0.1]])
    assert "it has no log yet" in cli.run("logs", job).err
    with queue.daemon(queue.folder):
        queue.wait_for(job, "running")
        said = cli.run("logs", job, TRAINER_WORK_DIR=str(queue.folder / "another-disk"))
    assert said.status == 1
    assert "runs on host" in said.err
    assert "attempts/e1-*/trainer.log" in said.err


def test_a_host_that_cannot_work_is_listed_with_what_is_wrong_and_what_to_do(cli: CommandLine, queue: Queue) -> None:
    (queue.folder / "jobs").write_text("a file in the place of the work folder")
    with queue.daemon(queue.folder):
        eventually(lambda: queue.select("SELECT id FROM training_workers WHERE state = 'out_of_service'"))
        table = " ".join(cli.run("workers").out.split())
        (row,) = cli.run("workers", "--json").lines
    assert "out of service" in table and "work folder since" in table and "TRAINER_WORK_DIR" in table
    assert row["state"] == "out_of_service" and row["troubles"][0]["name"] == "work folder"
