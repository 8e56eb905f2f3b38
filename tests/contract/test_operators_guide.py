"""The operator's guide says nothing that is not there: settings, commands, error codes, the fleet's plan."""

from __future__ import annotations

import json
import re

from typer.main import get_command

from daemon.__main__ import app
from daemon.fleet.pod_plan import read_plan
from daemon.gateway.schemas import RunRequest
from tests.paths import ROOT
from tests.postgres import AppDatabase
from training.events import ErrorCode
from training.spec import parse_row

GUIDE = (ROOT / "docs" / "operators-guide.md").read_text(encoding="utf-8")


def test_every_setting_that_the_guide_names_is_described() -> None:
    described = (ROOT / "docs" / "reference" / "configuration.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:TRAINER_[A-Z_]+[A-Z]|RUNPOD_(?:POD_ID|API_KEY))\b", GUIDE))
    assert len(named) > 15
    assert [name for name in sorted(named) if f"`{name}`" not in described] == []


def test_every_command_that_the_guide_names_exists() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"brightrun-trainer ([a-z][a-z-]+)", GUIDE))
    assert named - known == set()


def test_every_error_code_has_its_line() -> None:
    assert [code for code in ErrorCode if f"`{code}`" not in GUIDE] == []


def test_the_plan_of_the_guide_is_usable_as_it_stands() -> None:
    plan = read_plan(_documents()[0])
    assert plan.ends_itself and [kind.memory_gb for kind in plan.gpus] == [80, 80]


def test_the_request_of_the_guide_is_a_job_as_it_stands() -> None:
    request = json.loads(_documents()[1])
    submission = RunRequest.model_validate(request).input
    assert parse_row(submission.hyperparameters, submission.gpu_config).unknown_keys == ()
    # In milliseconds; a job's time to live begins before it runs.
    assert 10 * 60 * 1000 < request["policy"]["executionTimeout"] <= request["policy"]["ttl"]


def _documents() -> list[str]:
    """The fleet's plan, and the request of the serverless section."""
    found = re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)
    assert len(found) == 2
    return found


def test_the_links_within_the_page_lead_somewhere() -> None:
    headings = re.findall(r"^## (.+)$", GUIDE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", GUIDE)) <= anchors


def test_the_queries_of_the_guide_run(database: AppDatabase) -> None:
    """All but those on pg_cron, which a plain Postgres lacks."""
    queries = [query for query in re.findall(r"```sql\n(.*?)```", GUIDE, re.DOTALL) if "cron." not in query]
    assert len(queries) >= 3
    for query in queries:
        database.run(query.replace("%", "%%"))


def test_the_floor_of_the_cost_table_is_called_one() -> None:
    (line,) = [line for line in GUIDE.splitlines() if line.startswith("| 80B in 4 bits")]
    assert "planning floor" in line and "not a measurement" in line


def test_every_line_of_the_doctor_that_the_guide_names_exists() -> None:
    sources = "".join(file.read_text() for file in (ROOT / "daemon" / "doctor").glob("*.py"))
    named = re.findall(r"(?:doctor: |its line )\*([a-z ]+)\*", GUIDE)
    assert len(named) >= 3
    assert [name for name in named if f'"{name}' not in sources and f'f"{name}' not in sources] == []
