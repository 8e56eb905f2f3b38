"""The page on pushing and deploying: its settings are read, its words of ours understood, its SQL run.

What it says of vLLM is run against a real one by tests/serving/test_real_vllm.py.
"""

from __future__ import annotations

import re
import shlex

import psycopg
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from daemon.__main__ import app
from daemon.read_settings import load_settings
from tests.docs.blocks import blocks
from tests.postgres import AppDatabase

PAGE = "docs/how-to/deploy.md"
SHELL = [block.text.replace("\\\n", " ") for block in blocks() if block.page == PAGE and block.language == "sh"]


def test_the_settings_of_the_page_are_read_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:p@h/d")
    for name, value in re.findall(r"^export (\w+)=('[^']*'|\S+)", "\n".join(SHELL), re.MULTILINE):
        monkeypatch.setenv(name, shlex.split(value)[0].replace("$key", "key-of-the-endpoint"))
    settings = load_settings()
    assert dict(settings.hub_tokens).keys() == {"*", "7b1f8a52-1c0e-4f57-9d0c-2f6a4f0c9e11"}
    assert (settings.endpoint_url, settings.endpoint_max_rank) == ("http://10.0.0.5:8000", 32)
    assert (settings.endpoint_loads, settings.endpoint_sees) == ("itself", "/mnt/adapters")


def test_the_commands_of_the_page_are_there() -> None:
    ours = [line for text in SHELL for line in text.splitlines() if line.startswith("brightrun-trainer")]
    assert ours
    for line in ours:
        word = shlex.split(line)[1]
        assert word in get_command(app).commands  # type: ignore[attr-defined]
        assert CliRunner().invoke(app, [word, "--help"]).exit_code == 0


def test_a_delivery_is_asked_for_again_as_the_page_says(database: AppDatabase) -> None:
    [statement] = [block.text for block in blocks() if block.page == PAGE and block.language == "sql"]
    with pytest.raises(psycopg.Error, match="no such job"):
        database.run(statement)
