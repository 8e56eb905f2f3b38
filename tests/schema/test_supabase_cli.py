"""Our migrations in the hands of Supabase's own CLI, in a project with a history of its own, and `migrate` beside it.

The CLI works on plain Postgres databases here, without Docker. Each stands for a project, or for a branch of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from daemon.database.embedded_server import EmbeddedPostgres
from daemon.schema.fronts import fronts
from daemon.schema.migrations import bring_up_to_date, faults, migrate, migrations, pending
from tests.docs.database_types import TOOLS
from tests.docs.npm import NpmMissing, installed
from tests.fronts.pipeline import app_tables
from tests.paths import ROOT
from tests.postgres import BINARIES, AppDatabase, Server, app_job, hosted_project, insert_statement
from tests.sql.lints import findings
from tests.sql.test_lints import FLAWED

pytestmark = pytest.mark.system

OURS = ROOT / "sql" / "migrations"
VERSIONS = [migration.version for migration in migrations()]
EARLIER = {
    "20251225000001_app.sql": (ROOT / "tests" / "app_schema.sql").read_text(),
    "20260110000001_pipeline.sql": (ROOT / "tests" / "app_pipeline_schema.sql").read_text(),
}
# One that falls between ours, and one after them all.
BETWEEN = {"20261125000001_between.sql": "ALTER TABLE public.datasets ADD COLUMN colour text DEFAULT 'grey';"}
# Rules of the dashboard that this edition of the CLI does not have.
NOT_IN_THE_CLI = {
    "anon_table_exposed",
    "anon_security_definer_function_executable",
    "authenticated_security_definer_function_executable",
}
LATER = {"20991231000001_later.sql": "ALTER TABLE public.training_jobs ADD COLUMN note text;"}


class SupabaseProject:
    """A folder with supabase/migrations, as an app developer has it, and the CLI run in it."""

    def __init__(self, folder: Path, cli: Path) -> None:
        self.migrations = folder / "supabase" / "migrations"
        self.migrations.mkdir(parents=True)
        self._folder, self._cli = folder, cli

    def add(self, files: dict[str, str]) -> None:
        for name, text in files.items():
            (self.migrations / name).write_text(text)

    def add_ours(self) -> None:
        for file in OURS.glob("*.sql"):
            shutil.copy(file, self.migrations)

    def run(self, *command: str, refused: bool = False) -> str:
        """What `supabase COMMAND` says, on either stream."""
        environment = {**os.environ, "PGSSLMODE": "disable", "DO_NOT_TRACK": "1"}
        done = subprocess.run(
            [str(self._cli), *command, "--yes"],
            cwd=self._folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert (done.returncode != 0) == refused, said
        return said

    def push(self, database: AppDatabase, *options: str, refused: bool = False) -> str:
        return self.run("db", "push", f"--remote={database.dsn}", *options, refused=refused)

    def advice(self, database: AppDatabase) -> set[tuple[str, str]]:
        """What Supabase's own linter finds, as the CLI brings it: rule and object. No index has been used here yet."""
        said = self.run("db", "advisors", "--level=info", f"--remote={database.dsn}")
        found = json.loads(said[said.index("[") : said.rindex("]") + 1]) if "[" in said else []
        return {(one["name"], one["metadata"]["name"]) for one in found if one["name"] != "unused_index"}

    def differences(self, one: AppDatabase, other: AppDatabase) -> list[str]:
        """The statements of `supabase db diff` from one database to the other."""
        command = ["db", "diff", f"--from={one.dsn}", f"--to={other.dsn}", "--use-pg-delta", "--schema=public"]
        made = self._folder / "difference.sql"
        made.unlink(missing_ok=True)
        self.run(*command, f"--output={made}")
        lines = made.read_text().splitlines() if made.exists() else []
        return [
            line for line in lines if line.strip() and not line.startswith(("--", "SET local check_function_bodies"))
        ]


@pytest.fixture(scope="module")
def cli() -> Path:
    try:
        return installed(TOOLS, optional=True) / ".bin" / "supabase"
    except NpmMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def project(tmp_path: Path, cli: Path) -> SupabaseProject:
    return SupabaseProject(tmp_path / "app", cli)


@pytest.fixture
def hosted(postgres: Server) -> Iterator[Callable[[], AppDatabase]]:
    """Makes databases as Supabase hands them out: its own schemas and roles, and nothing of ours or the app's."""
    with ExitStack() as stack:

        def make() -> AppDatabase:
            database = AppDatabase(postgres.dsn(stack.enter_context(postgres.database())))
            stack.callback(database.close)
            app_tables(database, ("sql/local/supabase.sql",))
            return database

        yield make


def works(database: AppDatabase) -> None:
    """Everything is applied, nothing is broken, and the app's insert becomes a job that is due."""
    assert pending(database.dsn) == [] and migrate(database.dsn, local=False) == [] and faults(database.dsn) == []
    user = database.insert_user()
    text, values = insert_statement("training_jobs", app_job(user, database.insert_dataset(user)))
    with database.acting("authenticated", user) as app:
        app.execute(text.encode(), values)
    assert database.one("SELECT due FROM training_jobs")["due"]


def test_pushed_into_a_project_with_a_history_of_its_own(
    project: SupabaseProject, hosted: Callable[[], AppDatabase]
) -> None:
    database = hosted()
    project.add(EARLIER | BETWEEN | LATER)
    project.push(database)
    project.add_ours()
    # Its last migration is newer than ours: the CLI asks whether they may come in before it.
    assert "--include-all" in project.push(database, refused=True)
    assert database.one("SELECT to_regclass('public.training_leases') AS ours")["ours"] is None
    project.push(database, "--include-all")
    works(database)
    assert "up to date" in project.push(database)
    # A branch is made from nothing, by all files in their order: the app's stand before, between and after ours.
    branch = hosted()
    project.push(branch)
    assert project.differences(branch, database) == project.differences(database, branch) == []
    works(branch)


def test_pushed_by_an_owner_without_superuser_as_on_supabase(project: SupabaseProject) -> None:
    for binaries in BINARIES.values():
        # A server of its own: roles belong to the cluster, and there must be none of ours in it yet.
        with EmbeddedPostgres(binaries) as server:
            owner = AppDatabase(hosted_project(server))
            project.add(EARLIER)
            project.add_ours()
            project.push(owner)
            owner.close()
            assert migrate(owner.dsn, local=False) == [] and faults(owner.dsn) == []


def test_after_migrate_the_cli_wants_our_files_and_can_fetch_them(
    project: SupabaseProject, hosted: Callable[[], AppDatabase]
) -> None:
    database = hosted()
    project.add(EARLIER)
    project.push(database)
    bring_up_to_date(database.dsn, local=False, fronts=list(fronts().values()))
    project.add(LATER)
    said = project.push(database, refused=True)
    assert "not found in local migrations" in said and VERSIONS[0] in said
    project.run("migration", "fetch", f"--remote={database.dsn}")
    (front,) = project.migrations.glob("*_front_pipeline.sql")
    project.push(database)
    works(database)
    # What was fetched makes the same tables again.
    branch = hosted()
    project.push(branch)
    assert project.differences(branch, database) == project.differences(database, branch) == []
    works(branch)
    # Our own files, copied instead of fetched, are the same to the CLI.
    project.add_ours()
    assert "up to date" in project.push(database)
    assert len(list(project.migrations.iterdir())) == len(VERSIONS) + len(EARLIER) + len(LATER) + 1 and front.exists()


def test_pushed_or_migrated_the_schema_is_the_same(project: SupabaseProject, hosted: Callable[[], AppDatabase]) -> None:
    pushed, migrated = hosted(), hosted()
    project.add_ours()
    project.push(pushed)
    assert any("training_leases" in line for line in project.differences(migrated, pushed))
    migrate(migrated.dsn, local=False)
    assert project.differences(pushed, migrated) == project.differences(migrated, pushed) == []
    works(pushed)


def test_a_repaired_record_that_is_wrong_is_put_right(
    project: SupabaseProject, hosted: Callable[[], AppDatabase]
) -> None:
    database = hosted()
    project.add(EARLIER)
    project.push(database)
    migrate(database.dsn, local=False)
    # What the CLI itself advises when it finds versions that it has no file of.
    project.run("migration", "repair", "--status=reverted", *VERSIONS, f"--remote={database.dsn}")
    assert len(pending(database.dsn)) == len(VERSIONS)
    project.add_ours()
    project.push(database)
    works(database)
    # The other way round: said to be applied, though nothing of it is there.
    empty = hosted()
    project.push(empty, "--dry-run")
    for file in EARLIER:
        project.run("migration", "repair", "--status=applied", file.split("_")[0], f"--remote={empty.dsn}")
    app_tables(empty, ("tests/app_schema.sql", "tests/app_pipeline_schema.sql"))
    project.run("migration", "repair", "--status=applied", *VERSIONS, f"--remote={empty.dsn}")
    assert pending(empty.dsn) == []
    assert migrate(empty.dsn, local=False) == []
    works(empty)


def test_supabases_own_linter_finds_nothing_that_our_rules_do_not(
    project: SupabaseProject, hosted: Callable[[], AppDatabase]
) -> None:
    ours, both, flawed = hosted(), hosted(), hosted()
    migrate(ours.dsn, local=False)
    assert project.advice(ours) == set()
    app_tables(both, ("tests/app_schema.sql", "tests/app_pipeline_schema.sql"))
    bring_up_to_date(both.dsn, local=False, fronts=list(fronts().values()))
    flawed.run("ALTER TABLE auth.users ADD UNIQUE (email)")
    for statement in FLAWED.split(";\n")[:-1]:
        flawed.run(statement)
    assert project.advice(both) == by_our_rules(both)
    # Ours also find what nobody could reach.
    assert len(project.advice(flawed)) > 5 and project.advice(flawed) <= by_our_rules(flawed)


def by_our_rules(database: AppDatabase) -> set[tuple[str, str]]:
    return {(rule, name) for rule, name in map(_ruled, findings(database)) if rule not in NOT_IN_THE_CLI}


def _ruled(finding: str) -> tuple[str, str]:
    rule, subject = finding.split(": ", 1)
    return rule, re.split(r"[ .:(]", subject)[0]
