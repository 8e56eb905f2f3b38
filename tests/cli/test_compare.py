"""Jobs that a real daemon has trained, compared by the command; and adapters as folders, without a database."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest

from tests.cli.command import CommandLine, Said
from tests.daemon_process import FORKED_REAL
from tests.database_pool import DatabasePool
from tests.docs.blocks import blocks
from tests.doubles.chat_completions import KEY, MODEL, ChatCompletions
from tests.lifecycle.queue import Queue
from tests.postgres import Server
from tests.tiny_models import conversation, make_model

BASE = "acme/tiny"
pytestmark = [pytest.mark.timeout(420), pytest.mark.together]


@dataclass(frozen=True)
class Trained:
    """Two jobs of one user on equal data, one of which learns faster, with a command line of the same settings."""

    queue: Queue
    cli: CommandLine
    slow: UUID
    quick: UUID


@pytest.fixture(scope="module")
def trained(
    postgres: Server, database_pool: DatabasePool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    folder = tmp_path_factory.mktemp("compare")
    with database_pool.database() as name:
        queue = Queue(postgres.dsn(name), folder)
        yield train(queue, folder)
        queue.close()


def train(queue: Queue, folder: Path) -> Trained:
    make_model(folder / "models" / BASE, "qwen3")
    lines = [json.dumps(conversation(number)) for number in range(16)]
    slow, quick = (
        queue.insert(
            lines=lines, hyperparameters={"base_model": BASE, "num_epochs": 1, "lora_rank": 4, "learning_rate": rate}
        )
        for rate in (1e-6, 2e-2)
    )
    with queue.daemon(folder, command=FORKED_REAL):
        for job in (slow, quick):
            queue.wait_for(job, "completed", seconds=200)
    cli = CommandLine(
        folder,
        DATABASE_URL=queue.dsn,
        TRAINER_STORAGE="folder",
        TRAINER_STORAGE_DIR=str(folder / "storage"),
        TRAINER_WORK_DIR=str(folder / "jobs"),
        TRAINER_MODELS_DIR=str(folder / "models"),
        COLUMNS="80",
    )
    return Trained(queue, cli, slow, quick)


@pytest.mark.system
def test_jobs_answer_held_out_prompts_and_lose_what_their_rows_say(trained: Trained) -> None:
    slow, quick = str(trained.slow)[:8], str(trained.quick)[:8]
    head, *prompts = trained.cli.ok("compare", slow, quick, "--max-tokens", 6, "--json", "--quantize").lines
    assert [contestant["name"] for contestant in head["contestants"]] == ["base", slow, quick]
    common = head["held_out"][0]
    assert common["set"] == "common" and common["may_have_been_trained_on_by"] == []
    for job, name in ((trained.slow, slow), (trained.quick, quick)):
        measured = trained.queue.row(job)["result"]["summary"]["final_validation_loss"]
        assert common["losses"][name] == pytest.approx(measured, rel=2e-3)
    assert common["losses"][quick] < common["losses"][slow] <= common["losses"]["base"] * 1.001
    assert head["prompts_are_held_out"] and head["notes"] == []
    assert len(prompts) == common["conversations"] >= 1
    assert prompts[0]["reference"].startswith("The ")
    assert [answer["who"] for answer in prompts[0]["answers"]] == ["base", slow, quick]
    row = trained.queue.select("SELECT * FROM training_comparisons WHERE id = %s", head["id"])[0]
    assert row["user_id"] == trained.queue.user_id
    assert [contestant["job_id"] for contestant in row["contestants"]] == [None, str(trained.slow), str(trained.quick)]
    kept = trained.queue.select(
        "SELECT answers FROM training_comparison_answers WHERE comparison_id = %s ORDER BY number", head["id"]
    )
    assert [answer["text"] for answer in kept[0]["answers"]] == [said["text"] for said in prompts[0]["answers"]]


@pytest.mark.system
def test_the_terminal_has_what_the_json_has(trained: Trained) -> None:
    prompts = trained.cli.folder / "prompts.txt"
    prompts.write_text("What colour is the cat?\nWhat colour is\x1b[31m the dog?\n")
    page = trained.cli.folder / "page.html"
    words = ("compare", trained.slow, "-p", prompts, "--max-tokens", 12, "--html", page)
    said = trained.cli.ok(*words)
    lines = said.out.splitlines()
    # No terminal reads it here, and it goes on for minutes with a large model.
    assert "base: answering …" in said.err and "base: measuring the loss …" in said.err
    assert "What colour is the cat?" in page.read_text() and "\x1b" not in page.read_text()
    assert max(map(len, lines)) <= 80
    assert "you › What colour is␛[31m the dog?" in lines
    assert any(line.split() == ["base", str(trained.slow)[:8]] for line in lines)


@pytest.mark.system
def test_a_dataset_that_changed_or_is_gone_is_said(trained: Trained) -> None:
    queue, cli = trained.queue, trained.cli
    row = queue.select("SELECT storage_path FROM datasets WHERE id = %s", queue.row(trained.slow)["dataset_id"])[0]
    file = queue.folder / "storage" / "lora-datasets" / row["storage_path"]
    whole = file.read_text()
    prompts = cli.folder / "one.txt"
    prompts.write_text("What colour is the cat?\n")
    try:
        file.write_text(whole + json.dumps(conversation(99)) + "\n")
        head = cli.ok("compare", trained.slow, "-p", prompts, "--max-tokens", 2, "--json").lines[0]
        assert "it has changed since" in head["notes"][0]
        file.unlink()
        said = cli.run("compare", trained.slow)
        assert said.status == 2 and "There are no prompts" in said.err and "--prompts" in said.err
        head = cli.ok("compare", trained.slow, "-p", prompts, "--max-tokens", 2, "--json").lines[0]
        assert "the held-out data of" in head["notes"][0].lower() and head["held_out"] == []
    finally:
        file.write_text(whole)


@pytest.mark.system
def test_folders_need_no_database_and_wrong_words_are_said_at_once(trained: Trained, tmp_path: Path) -> None:
    trained.cli.ok("download", trained.quick, "--to", tmp_path / "mine")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What colour is the cat?"}\n')
    models = str(trained.cli.folder / "models")
    cli = CommandLine(tmp_path, TRAINER_MODELS_DIR=models, PATH=trained.cli.environment["PATH"])
    head, prompt = cli.ok("compare", "mine", "-p", prompts, "--max-tokens", 4, "--json").lines
    assert head["contestants"][1]["about"].startswith("rank 4, epochs 1")
    assert head["held_out"] == [] and prompt["answers"][1]["tokens"] >= 1


@pytest.mark.system
async def test_a_judge_is_asked_and_its_verdicts_are_kept_apart(trained: Trained) -> None:
    def judge(first: str, second: str, _all: str) -> str:
        # A preference of its own, whatever the tiny models said.
        return f"VERDICT: {'A' if first < second else 'B'}"

    async with ChatCompletions(judge) as api:
        words = ["compare", trained.slow, trained.quick, "--max-tokens", 6, "--json", "--judge", api.base]

        def run(model: str) -> Said:
            return trained.cli.run(*words, "--judge-model", model, TRAINER_JUDGE_KEY=KEY)

        said = await asyncio.to_thread(run, MODEL)
        refused = await asyncio.to_thread(run, "nobody")
    assert said.status == 0 and KEY not in said.out + said.err
    head = said.lines[0]
    pairs = head["prompts"] * 3
    assert sum(sum(judged["votes"].values()) for judged in head["judged"]) == pairs and len(api.requests) == 2 * pairs
    kept = trained.queue.select("SELECT kind, voter FROM training_votes WHERE comparison_id = %s", head["id"])
    assert [(row["kind"], row["voter"]) for row in kept] == [("judge", MODEL)] * pairs
    # What was answered is shown and kept, whatever the judge does.
    assert refused.status == 1 and "The model `nobody` does not exist" in refused.err
    assert refused.lines[0]["judged"] == [] and len(refused.lines) == 1 + head["prompts"]
    assert "was not asked about all pairs" in refused.lines[0]["notes"][0]


@pytest.mark.system
def test_the_commands_of_the_page_run(trained: Trained) -> None:
    """The page's own commands; answers are short, since a tiny model never ends one."""
    asked = [block.text for block in blocks() if (block.page, block.language) == ("docs/how-to/compare.md", "sh")]
    assert len(asked) >= 3
    (trained.cli.folder / "prompts.txt").write_text("Why?\n")
    for line in "\n".join(asked).splitlines():
        words = shlex.split(line.partition(" > ")[0]) if line.startswith("brightrun-trainer") else []
        named = [{"$one": str(trained.slow), "$other": str(trained.quick)}.get(word, word) for word in words[1:]]
        if named and "--max-tokens" not in named:
            named += ["--max-tokens", "4"]
        assert not named or trained.cli.ok(*named).out


def test_wrong_words_are_said_at_once(tmp_path: Path) -> None:
    for name in ("mine", "another"):
        (tmp_path / name).mkdir()
        config = json.dumps({"base_model_name_or_path": f"acme/{name}"})
        (tmp_path / name / "adapter_config.json").write_text(config)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Why?\n")
    cli = CommandLine(tmp_path, TRAINER_MODELS_DIR=str(tmp_path))
    for words, said in (
        (("mine",), "There are no prompts"),
        (("mine", "another", "-p", prompts), "of different base models"),
        (("mine", "mine", "-p", prompts), "named twice"),
        (("nowhere!", "-p", prompts), "neither an adapter's folder nor a job's id"),
        (("mine", "-p", prompts, "--judge", "api.example.com", "--judge-model", "m"), "is no http address"),
        (("mine", "-p", prompts, "--judge", "https://a"), "has no model"),
        (("mine", "-p", prompts, "--rubric", "Be kind."), "There is no judge"),
        (("mine", "-p", prompts, "--html", "nowhere/page.html"), "for the HTML file"),
        (("mine", "-p", "absent.txt"), "There is no file absent.txt"),
    ):
        failed = cli.run("compare", *words)
        assert failed.status == 2 and said in failed.err, failed
