"""Every command, statement and JSON document of the documentation is run as it stands, or says why not.

The statements and short commands meet a database in which there is something to find; the tutorial is followed from its
first line to its last by `test_the_tutorial_leads_where_it_says`, with a real daemon and a tiny model.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from typer.main import get_command

from daemon.__main__ import app
from daemon.database.connection import Database
from daemon.demo.model import MODEL_NAME
from daemon.queue.sql_job_store import SqlJobStore
from tests.docs.blocks import COMPARED, ELSEWHERE, REASONS, RUN, Block, blocks, runnable
from tests.docs.render import DOCS, PAGES
from tests.docs.test_cookbook import as_psql, furnish, run_as
from tests.paths import ROOT
from tests.postgres import AppDatabase
from training.spec import parse_row

TUTORIAL = "docs/tutorial.md"
# What the front page abbreviates.
PLACEHOLDERS = {"'6f1d…'": ":'user_id'", "'b2c4…'": ":'dataset_id'", "'58be…'": ":'job_id'"}


@pytest.fixture
async def store(database: AppDatabase) -> AsyncIterator[SqlJobStore]:
    async with Database(database.dsn, application_name="test") as connection:
        yield SqlJobStore(connection)


def test_every_block_is_run_or_says_why_not() -> None:
    unclassified = [
        block.place
        for block in blocks()
        if block.language not in (*RUN, *COMPARED) or (block.reason and block.reason not in REASONS)
    ]
    assert unclassified == [], f"name a language of {RUN} and, where it cannot be run, one of {sorted(REASONS)}"


def test_few_blocks_are_not_run() -> None:
    """A count, so that nobody gets used to it: raise it with a reason in the commit."""
    excused = Counter(block.reason for block in blocks() if block.reason)
    assert excused.total() <= 21, excused
    assert len(runnable()) >= 25
    present = {(block.page, block.language) for block in blocks()}
    assert [(page, by) for (page, language), by in ELSEWHERE.items() if (page, language) not in present] == []
    assert [by for by in ELSEWHERE.values() if not (ROOT / by).exists()] == []


def test_every_command_that_is_named_exists_even_where_it_is_not_run() -> None:
    group = get_command(app)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = []
    for block in blocks():
        if block.language != "sh":
            continue
        text = re.sub(r"(^|\s)#.*$", "", block.text, flags=re.MULTILINE)
        for word, second in re.findall(r"brightrun-trainer ([a-z][a-z-]*)(?: ([a-z]+))?", text):
            command = group.commands.get(word)  # type: ignore[attr-defined]
            if command is None or (word == "models" and second not in command.commands):
                unknown.append((block.place, word, second))
        unknown += [
            (block.place, "make", name) for name in re.findall(r"\bmake ([a-z-]+)", text) if name not in targets
        ]
    assert unknown == []


@pytest.mark.parametrize("page", sorted(PAGES))
def test_a_page_that_is_made_from_the_code_is_as_the_code_is(page: str) -> None:
    assert (DOCS / page).read_text(encoding="utf-8") == PAGES[page](), "PYTHONPATH=. python tests/docs/render.py"


def test_every_json_document_is_a_job_that_is_accepted() -> None:
    shown = [block for block in runnable() if block.language == "json"]
    assert shown
    for block in shown:
        job = json.loads(block.text)
        assert parse_row(job["hyperparameters"], job["gpu_config"]).unknown_keys == (), block.place


async def test_every_statement_runs_as_the_role_it_names(store: SqlJobStore, database: AppDatabase) -> None:
    user = database.insert_user()
    values = await furnish(store, database, user)
    statements = [block for block in runnable() if block.language == "sql"]
    assert len(statements) > 8
    for block in statements:
        text = block.text
        for short, variable in PLACEHOLDERS.items():
            text = text.replace(short, variable)
        role = re.match(r"-- as: (user|server|operator)\n", text)
        try:
            run_as(database, role[1] if role else "operator", user, as_psql(text, values))
        except psycopg.Error as error:
            raise AssertionError(f"{block.place}: {error}") from error


def shell(folder: Path, script: str, seconds: float, **environment: str) -> str:
    """Run a page's commands as one script, which ends at the first that fails; what it said."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, command in {"brightrun-trainer": f"{sys.executable} -m daemon", "python": sys.executable}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (tools / name).chmod(0o755)
    done = subprocess.run(
        # Jobs that a reader would leave in the background end with the script.
        ["bash", "-euo", "pipefail", "-c", f"trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}"],
        cwd=folder,
        env={
            "PATH": f"{tools}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "2",
            "COLUMNS": "100",
        }
        | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-4000:]}"
    return done.stdout


def script_of(found: list[Block]) -> str:
    return "\n".join(block.text for block in found if block.language in ("sh", "python"))


async def test_the_commands_of_every_page_but_the_tutorial_run(
    store: SqlJobStore, database: AppDatabase, tmp_path: Path
) -> None:
    user: UUID = database.insert_user()
    values = await furnish(store, database, user)
    commands = [block for block in runnable() if block.language in ("sh", "python") and block.page != TUTORIAL]
    assert {block.page for block in commands} >= {"docs/how-to/datasets.md", "docs/how-to/resuming.md"}
    shell(
        tmp_path,
        script_of(commands),
        170,
        DATABASE_URL=database.dsn,
        TRAINER_STORAGE="folder",
        TRAINER_STORAGE_DIR=str(tmp_path / "storage"),
        TRAINER_WORK_DIR=str(tmp_path / "jobs"),
        TRAINER_MODELS_DIR=str(tmp_path / "models"),
        FAILED_JOB=str(values["failed_id"]),
        RUNNING_JOB=str(values["running_id"]),
    )


@pytest.mark.system
def test_the_tutorial_leads_where_it_says(tmp_path_factory: pytest.TempPathFactory) -> None:
    """From the second step on; the first is `make demo`. A tiny model stands where the demo's is."""
    from tests.tiny_models import make_model

    folder = tmp_path_factory.mktemp("tutorial")
    (folder / "daemon").symlink_to(ROOT / "daemon")
    make_model(folder / "cache" / "brightrun-trainer" / "models" / MODEL_NAME, "llama")
    said = shell(folder, script_of(runnable(TUTORIAL)), 600, XDG_CACHE_HOME=str(folder / "cache"))
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert (folder / "adapter" / "training.tfevents").exists()
    assert said.count("completed") >= 2, said[-3000:]
