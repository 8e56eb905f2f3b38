"""The reference names exactly what there is: columns, views, functions, events, messages, codes."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterator
from pathlib import Path

from daemon.report.webhook import MAX_BODY_BYTES
from daemon.storage.publish import BESIDE
from sql import migrations, queries
from tests.paths import ROOT
from tests.postgres import AppDatabase
from training.events import ErrorCode, Stage

TEXT = "\n".join((ROOT / "docs" / "reference" / page).read_text() for page in ("schema.md", "errors.md"))
# Described by what we write into them; their columns are the app's own.
APP_TABLES = {"datasets", "metrics_points", "model_artifacts", "cost_records", "notifications"}


def section(title: str) -> str:
    """What stands under a heading, up to the next of its own or a higher level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,6}} |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the reference has no section {title}"
    return found[2]


def marked(name: str) -> list[str]:
    """The first cells of the table between two comments."""
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", TEXT, re.DOTALL)
    assert found is not None, f"the reference has no table {name}"
    return re.findall(r"^\| `([^`]+)` \|", found[1], re.MULTILINE)


def relations(database: AppDatabase, kinds: str) -> set[str]:
    rows = database.run(
        "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind::text = ANY (%s)",
        (list(kinds),),
    )
    return {row["relname"] for row in rows}


def columns(database: AppDatabase, relation: str) -> list[tuple[str, str]]:
    rows = database.run(
        "SELECT attname, format_type(atttypid, atttypmod) AS kind FROM pg_attribute "
        "WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
        (f"public.{relation}",),
    )
    short = {"timestamp with time zone": "timestamptz", "character varying": "varchar"}
    listed = []
    for row in rows:
        kind = row["kind"]
        for long, brief in short.items():
            kind = kind.replace(long, brief)
        listed.append((row["attname"], kind))
    return listed


def test_every_column_of_every_table_and_view_is_described_with_its_type(database: AppDatabase) -> None:
    tables, views = relations(database, "rp"), relations(database, "vm")
    assert tables >= APP_TABLES and views
    for relation in sorted(tables - APP_TABLES | views):
        described = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]*\S[^|]* \|$", section(relation), re.MULTILINE)
        assert sorted(described) == sorted(columns(database, relation)), relation


def test_every_function_is_described_with_its_arguments(database: AppDatabase) -> None:
    rows = database.run(
        "SELECT proname || '(' || pg_get_function_identity_arguments(oid) || ')' AS signature FROM pg_proc "
        "WHERE pronamespace = 'public'::regnamespace AND prorettype <> 'trigger'::regtype"
    )
    real = {re.sub(r", OUT .*\)", ")", row["signature"]) for row in rows}
    described = re.findall(r"^\| `(\w+\([^`]*\))` \|", section("Functions"), re.MULTILINE)
    assert set(described) == real


def sources(package: str) -> Iterator[ast.Module]:
    for path in (ROOT / package).rglob("*.py"):
        # CPython 3.11 loses count when the collector runs a finalizer that parses too (python/cpython#106905).
        gc.disable()
        try:
            tree = ast.parse(path.read_text())
        finally:
            gc.enable()
        yield tree


def spoken_kinds() -> set[str]:
    """First arguments of `tell(…)`, `notice(…)` and `Remark(…)`: what the host and the trainer put into the story."""
    kinds = set()
    for tree in (*sources("daemon"), *sources("training")):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("tell", "notice", "Remark") and isinstance(node.args[0].value, str):
                kinds.add(node.args[0].value)
    return kinds


def sql_of(package: object) -> str:
    (folder,) = package.__path__  # type: ignore[attr-defined]
    return "\n".join(path.read_text() for path in sorted(Path(folder).rglob("*.sql")))


def announce() -> str:
    found = re.search(r"FUNCTION public\.training_jobs_announce\(\).*?\n\$\$;", sql_of(migrations), re.DOTALL)
    assert found is not None
    return found[0]


def test_every_event_that_the_host_and_the_trainer_tell_is_described() -> None:
    assert set(marked("events: host")) == spoken_kinds()


def test_every_event_that_the_database_writes_is_described() -> None:
    naming = re.search(r"IF TG_OP = 'INSERT'(.*?)INSERT INTO public\.training_events", announce(), re.DOTALL)
    assert naming is not None
    named = set(re.findall(r"kind := '(\w+)'", naming[1]))
    for choice in re.findall(r"kind := CASE(.*?)END;", naming[1], re.DOTALL):
        named |= set(re.findall(r"(?:THEN|ELSE) '(\w+)'", choice))
    # `NEW.status`: the endings are called as the states are.
    assert "kind := NEW.status" in naming[1] and "THEN NEW.status" in naming[1]
    named |= {"completed", "failed", "cancelled"}
    everywhere = sql_of(migrations) + sql_of(queries)
    for statement in re.findall(r"INSERT INTO (?:public\.)?training_events.*?(?:;|\n\))", everywhere, re.DOTALL):
        named |= set(re.findall(r"(?:epoch|lease_epoch), '(\w+)'", statement))
    assert {"stopped", "notice"} <= named
    assert set(marked("events: database")) == named


def test_every_callback_event_and_field_is_described(database: AppDatabase) -> None:
    naming = re.search(r"event := 'job\.' \|\| CASE(.*?)END;", announce(), re.DOTALL)
    assert naming is not None
    named = {f"job.{word}" for word in re.findall(r"THEN '(\w+)'", naming[1])}
    # `ELSE kind`: of the kinds that remain, those that are no requeue.
    named |= {"job.started", "job.completed", "job.failed", "job.cancelled", "job.progress"}
    of_deliveries = re.search(r"FUNCTION public\.training_deliveries_announce.*?\n\$\$;", sql_of(migrations), re.DOTALL)
    assert of_deliveries is not None
    named |= set(re.findall(r"'(job\.\w+)'", of_deliveries[0]))
    assert set(marked("callback events")) == named

    user = database.insert_user()
    job_id = database.insert_job(user, callback_url="https://app.example.org/hook")
    database.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (job_id,))
    payload = database.one("SELECT payload FROM training_callbacks WHERE job_id = %s", (job_id,))["payload"]
    assert set(marked("payload")) == set(payload)


def test_every_error_code_state_and_stage_is_described(database: AppDatabase) -> None:
    assert marked("error codes") == [code.value for code in ErrorCode]
    for stage in Stage:
        assert f"`{stage.value}`" in section("States"), stage
    rule = database.one(
        "SELECT pg_get_constraintdef(oid) AS text FROM pg_constraint WHERE conname = 'training_workers_state_known'"
    )["text"]
    assert set(marked("worker states")) == {*re.findall(r"'(\w+)'", rule), "lost"}


def test_every_refusal_of_the_database_is_described() -> None:
    raised = set(re.findall(r"ERRCODE = '(\w+)'", sql_of(migrations)))
    described = re.findall(r"^\| `(\w+)` \| \d+ \|", section("Refusals by the database"), re.MULTILINE)
    assert set(described) == raised


def test_every_file_of_an_artifact_is_named() -> None:
    for name in (*BESIDE, "archive", "manifest"):
        assert f"`{name}`" in section("Written when a job ends"), name
    assert f"under {MAX_BODY_BYTES // 1000} kB" in section("Callbacks")
