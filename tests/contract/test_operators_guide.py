"""The operator's guide says nothing that is not there: settings, commands, error codes, the fleet's plan."""

from __future__ import annotations

import re
from pathlib import Path

from typer.main import get_command

from daemon.__main__ import app
from daemon.fleet_plan import read_plan
from training.events import ErrorCode

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "operators-guide.md").read_text(encoding="utf-8")


def test_every_setting_that_the_guide_names_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:TRAINER_[A-Z_]+[A-Z]|RUNPOD_(?:POD_ID|API_KEY))\b", GUIDE))
    assert len(named) > 15
    assert [name for name in sorted(named) if f"`{name}`" not in readme] == []


def test_every_command_that_the_guide_names_exists() -> None:
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"brightrun-trainer ([a-z][a-z-]+)", GUIDE))
    assert named - known == set()


def test_every_error_code_has_its_line() -> None:
    assert [code for code in ErrorCode if f"`{code}`" not in GUIDE] == []


def test_the_plan_of_the_guide_is_usable_as_it_stands() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", GUIDE, re.DOTALL)
    plan = read_plan(text)
    assert plan.ends_itself and [kind.memory_gb for kind in plan.gpus] == [80, 80]


def test_the_links_within_the_page_lead_somewhere() -> None:
    headings = re.findall(r"^## (.+)$", GUIDE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", GUIDE)) <= anchors
