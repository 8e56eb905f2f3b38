"""The pages of the reference that are made from the code: `PYTHONPATH=. python tests/docs/render.py` writes them."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from daemon.errors import DatabaseAway
from tests.paths import ROOT

DOCS = ROOT / "docs"

_CLI_HEAD = """\
# Commands

`brightrun-trainer WORD`. Made from the code by `tests/docs/render.py`; a test compares.

Settings come from the environment or a `.env` file in the working folder; commands that only look need
`DATABASE_URL` alone. `--json` prints one object a line. Exit status 0 is success, 1 failure, 2 words that were not
understood, 78 an unusable configuration. A job is named by its id or its first characters, four or more.

Completion for your shell, once: `brightrun-trainer --install-completion` (bash, zsh, fish, PowerShell), or print it
with `--show-completion` and put it where you keep such things.
"""

_HTTP_HEAD = """\
# HTTP

What `brightrun-trainer serve` answers. Made from the code by `tests/docs/render.py`; a test compares. The whole
description with every field is served at `/openapi.json`, and for reading at `/docs`.

Callers send `Authorization: Bearer KEY`, one of `TRAINER_GATEWAY_KEYS`, except where it says *open*. Errors are JSON
problems (`error`, `hint`, `faults`); 401 without a key, 413 too large, 422 not understood, 429 too many, 503 while the
database is away. The dashboard is at `/` and signs in with the same keys.
"""

_METRICS_HEAD = """
## metrics

What `GET /metrics` answers. Gauges are the rows as they stand; counters and the histogram begin with this process.
`by X:` names a label.

| metric | kind | what it is |
|---|---|---|
"""


def cli_page() -> str:
    from typer.main import get_command

    from daemon.__main__ import app

    parts = [_CLI_HEAD]
    panels: dict[str, list[tuple[str, Any]]] = {}
    for name, command in _commands(get_command(app)).items():
        panels.setdefault(command.rich_help_panel or "", []).append((name, command))
    for panel, commands in panels.items():
        parts.append(f"\n## {panel}\n")
        parts += [_command(name, command) for name, command in commands]
    return "\n".join(parts)


def _commands(group: Any, before: str = "", panel: str = "") -> dict[str, Any]:
    """Every command by its full words; those of a group stand in the group's panel."""
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= _commands(command, f"{before}{name} ", command.rich_help_panel)
        else:
            command.rich_help_panel = panel or command.rich_help_panel
            found[before + name] = command
    return found


def _command(name: str, command: Any) -> str:
    words, rows = [name], []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            shown = parameter.metavar or parameter.name.upper()
            words.append(shown if parameter.required else f"[{shown}]")
            rows.append((f"`{shown}`", parameter.help))
        else:
            rows.append((", ".join(f"`{option}`" for option in parameter.opts), parameter.help))
    text = " ".join((command.help or "").split())
    table = "".join(f"| {option} | {_cell(help_text or '')} |\n" for option, help_text in rows)
    return f"### {' '.join(words)}\n\n{text}\n" + (f"\n| | |\n|---|---|\n{table}" if rows else "")


def http_page() -> str:
    description = _openapi()
    sections: dict[str, list[str]] = {}
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            answers = ", ".join(sorted(operation["responses"]))
            access = "key" if operation.get("security") else "*open*"
            text = " ".join((operation.get("description") or operation.get("summary") or "").split())
            row = f"| `{method.upper()} {path}` | {_cell(text)} | {access} | {answers} |"
            sections.setdefault((operation.get("tags") or ["other"])[0], []).append(row)
    parts = [_HTTP_HEAD]
    for tag, rows in sections.items():
        parts.append(
            f"\n## {tag}\n\n| request | what it does | access | answers |\n|---|---|---|---|\n" + "\n".join(rows)
        )
    return "\n".join(parts) + "\n" + _METRICS_HEAD + "\n".join(_metrics()) + "\n"


def _metrics() -> list[str]:
    """A row for each name that Prometheus finds."""
    from prometheus_client.parser import text_string_to_metric_families

    from daemon.gateway.metrics import ServiceMetrics

    class Away:
        async def fetch(self, name: str, parameters: Any, /) -> list[dict[str, Any]]:
            raise DatabaseAway("nothing is asked for a page of names")

    text = asyncio.run(ServiceMetrics(Away()).exposition()).decode()
    rows = []
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        if not name.endswith("_created"):
            rows.append(f"| `{name}` | {family.type} | {_cell(family.documentation)} |")
    return rows


def _openapi() -> dict[str, Any]:
    """The gateway's own description; nothing is connected to for it."""
    from daemon.gateway.app import build_app
    from daemon.gateway.dashboard.broadcaster import Feed
    from daemon.gateway.job_rows import GatewayRows
    from daemon.gateway.metrics import ServiceMetrics
    from daemon.settings import load_settings

    nowhere = "postgresql://nobody@127.0.0.1:1/none"
    settings = load_settings(database_url=nowhere, gateway_keys=("0123456789abcdef",), storage="folder")
    rows = GatewayRows(settings)
    return build_app(settings, rows, ServiceMetrics(rows), Feed(nowhere), asyncio.Event()).openapi()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {"cli.md": cli_page, "http.md": http_page}

if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    for name, render in PAGES.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
