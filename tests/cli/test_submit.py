"""From a file to a job: refused before a byte is uploaded, or stored under its owner and queued."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from psycopg.types.json import Jsonb

from daemon.cli.commands.check import facts
from daemon.cli.data.preflight import PreflightReport
from tests.cli.command import CommandLine, Said
from tests.doubles.endpoint import EndpointDouble
from tests.lifecycle.queue import Queue

CONVERSATION = {
    "messages": [{"role": "user", "content": "Why do cats purr?"}, {"role": "assistant", "content": "Ahoy! They hum."}]
}


@pytest.fixture
def dataset(queue: Queue) -> Path:
    file = queue.folder / "my talks #1.jsonl"
    file.write_text("".join(json.dumps(CONVERSATION) + "\n" for _ in range(8)))
    return file


def stored(queue: Queue) -> list[Path]:
    return [path for path in (queue.folder / "storage" / "lora-datasets").rglob("*") if path.is_file()]


def count(queue: Queue, table: str) -> int:
    with queue.connect() as connection:
        row = connection.execute(f"SELECT count(*) AS n FROM {table}").fetchone()
    assert row is not None
    return int(row["n"])


def test_a_file_becomes_a_job_that_a_daemon_completes(cli: CommandLine, queue: Queue, dataset: Path) -> None:
    words = ("--model", "tiny", "--epochs", 2, "--lr", "1e-4", "--rank", 8, "--set", "max_length=256", "--priority", 7)
    with queue.daemon(queue.folder):
        said = cli.ok("submit", dataset, *words, "--name", "My talks", "--watch")
    assert "can be trained on" in said.out
    (row,) = cli.ok("jobs", "--json").lines
    job = queue.row(row["job_id"])
    assert job["status"] == "completed"
    assert job["priority"] == 7
    assert job["hyperparameters"] == {
        "base_model": "tiny", "num_epochs": 2, "learning_rate": 1e-4, "lora_rank": 8, "max_length": 256,
    }  # fmt: skip
    (file,) = stored(queue)
    assert file.read_bytes() == dataset.read_bytes()
    with queue.connect() as connection:
        made = connection.execute("SELECT * FROM datasets").fetchone()
    assert made is not None
    assert made["storage_path"] == str(file.relative_to(queue.folder / "storage" / "lora-datasets"))
    assert made["storage_path"].startswith(f"{queue.user_id}/")
    assert (made["name"], made["file_name"], made["total_training_pairs"]) == ("My talks", "my talks #1.jsonl", 8)


def test_a_bad_file_is_refused_before_it_is_uploaded(cli: CommandLine, queue: Queue) -> None:
    bad = queue.folder / "bad.jsonl"
    bad.write_text(json.dumps(CONVERSATION) + '\n{"messages": [\n')
    said = cli.run("submit", bad, "--model", "tiny")
    assert said.status == 1
    assert "line 2: not JSON" in said.err
    assert (stored(queue), count(queue, "training_jobs"), count(queue, "datasets")) == ([], 0, 0)
    assert cli.run("submit", queue.folder / "absent.jsonl").status == 2


def test_every_wrong_wish_is_named_at_once(cli: CommandLine, dataset: Path) -> None:
    said = cli.run("submit", dataset, "--rank", 9999, "--lr", 7, "--set", "batch_size=0")
    assert said.status == 2
    for name in ("lora_rank", "learning_rate", "batch_size"):
        assert name in said.err
    onnx = cli.run("submit", dataset, "--set", 'exports=["onnx"]', "--set", "push_to_hub=acme").err
    assert "exports.0: Input" in onnx and "push_to_hub: must be OWNER/NAME" in onnx
    assert "unknown: lora_rnk" in cli.run("submit", dataset, "--set", "lora_rnk=8").err
    assert "is not KEY=VALUE" in cli.run("submit", dataset, "--set", "rank").err


def test_a_dry_run_says_what_it_takes_and_changes_nothing(cli: CommandLine, queue: Queue, dataset: Path) -> None:
    unknown = cli.ok("submit", dataset, "--model", "tiny", "--dry-run")
    assert "no job of this model has completed here yet" in unknown.out
    earlier = queue.insert()
    with queue.connect() as connection, connection.transaction():
        connection.execute("ALTER TABLE training_jobs DISABLE TRIGGER USER")
        connection.execute(
            "UPDATE training_jobs SET status = 'completed', due = false, started_at = now() - interval '70 seconds', "
            "completed_at = now(), final_cost = 0.07, result = %s WHERE id = %s",
            (Jsonb({"summary": {"tokens": 600, "training_seconds": 60}}), earlier),
        )
        connection.execute("ALTER TABLE training_jobs ENABLE TRIGGER USER")
    before = stored(queue)
    said = cli.ok("submit", dataset, "--model", "tiny", "--epochs", 3, "--dry-run", "--json").lines[0]
    # 8 × 32 characters are 64 tokens; three epochs at 10 tokens/s, and the 10 s that the other job needed beside it.
    assert said["forecast"]["seconds"] == pytest.approx(64 * 3 / 10 + 10)
    assert said["forecast"]["dollars"] == pytest.approx(0.001 * said["forecast"]["seconds"], rel=0.01)
    assert "1 earlier job of this model" in said["forecast"]["by"]
    assert stored(queue) == before
    assert count(queue, "training_jobs") == 1


def test_a_refused_insert_takes_its_upload_back(cli: CommandLine, queue: Queue, dataset: Path) -> None:
    nobody = "00000000-0000-0000-0000-000000000001"
    said = cli.run("submit", dataset, "--model", "tiny", "--user", nobody)
    assert said.status == 2
    assert f"No user has the id {nobody}" in said.err
    assert (stored(queue), count(queue, "datasets")) == ([], 0)
    assert "The job has no owner" in cli.run("submit", dataset, TRAINER_SERVICE_USER_ID="").err


def test_a_check_needs_no_database(queue: Queue, dataset: Path) -> None:
    alone = CommandLine(queue.folder)
    verdict = alone.ok("check", dataset, "--json").lines[0]["dataset"]
    counts = verdict["data"]
    assert (counts["conversations"], counts["answers"]) == (1, 8)  # one conversation in eight copies
    # Without the base model half of the questions are open.
    assert "not_judged" in [remark["code"] for remark in verdict["remarks"]]
    job = queue.folder / "job.json"
    job.write_text(json.dumps({"hyperparameters": {"epochs": 3, "rank": 900}, "gpu_config": {"count": 0}}))
    said = alone.run("check", job)
    assert said.status == 1
    assert "hyperparameters.rank" in said.out
    assert "gpu_config.count" in said.out
    job.write_text(json.dumps({"hyperparameters": {"base_model": "tiny", "colour": "red"}}))
    said = alone.ok("check", job, "--data", dataset)
    assert "unknown and unused: hyperparameters.colour" in said.out
    assert "can be trained on" in said.out and "8 answers of 1 conversation" in said.out


def test_a_check_with_the_model_says_in_words_what_will_be_trained() -> None:
    counts = {
        "format": "pairs", "train_conversations": 7, "train_answers": 28, "validation_conversations": 1,
        "validation_answers": 3, "train_tokens": 21_125, "trained_share": 0.1628, "tokens_min": 359, "tokens_max": 1175,
        "tokens_median": 787, "max_length": 1216, "total_steps": 21, "total_epochs": 3,
    }  # fmt: skip
    said = facts(PreflightReport(ok=True, errors=(), remarks=(), data=counts, estimate=None))
    assert said[1:3] == [("to train on", "28 answers of 7 conversations"), ("held out", "3 answers of 1 conversation")]
    assert dict(said)["steps"] == "21 in 3 epochs" and "21,125 an epoch, 16 %" in dict(said)["tokens"]


async def test_a_check_asks_whether_the_endpoint_could_serve_the_adapter(cli: CommandLine) -> None:
    async with EndpointDouble("acme/base") as endpoint:

        def check(**hyperparameters: object) -> Said:
            job = {"hyperparameters": {"base_model": "acme/base", **hyperparameters}, "gpu_config": {}}
            (cli.folder / "job.json").write_text(json.dumps(job))
            shared = {"TRAINER_ENDPOINT_URL": endpoint.url, "TRAINER_ENDPOINT_DIR": str(cli.folder / "shared")}
            return cli.run("check", "job.json", "--json", **shared)

        assert (await asyncio.to_thread(check)).lines[0]["endpoint_misfits"] == []
        large = await asyncio.to_thread(lambda: check(lora_rank=32))
        assert large.status == 0 and "above the endpoint's 16" in large.lines[0]["endpoint_misfits"][0]
        asked = await asyncio.to_thread(lambda: check(lora_rank=32, deploy="support"))
        assert asked.status == 1 and "above the endpoint's 16" in asked.lines[0]["faults"][0]
        assert (await asyncio.to_thread(lambda: check(deploy=False))).lines[0]["endpoint_misfits"] is None
