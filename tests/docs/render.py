"""The pages of the reference that are made from the code: `PYTHONPATH=. python tests/docs/render.py` writes them."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
from typing import Any, Literal, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from daemon.errors import DatabaseAway
from daemon.settings import Settings
from tests.paths import ROOT
from training.spec import Hyperparameters

DOCS = ROOT / "docs"

_CLI_HEAD = """\
# Commands

`brightrun-trainer WORD`. Made from the code by `tests/docs/render.py`; a test compares.

| command | what it does |
|---|---|
| `submit FILE`, `jobs`, `show`, `watch`, `events`, `logs`, `cancel`, `retry` | jobs, from a terminal |
| `download`, `chat`, `compare` | download an adapter and verify it; talk to it beside its base model; compare several |
| `export`, `push` | merge an adapter into its base model, for other servers; put it on the hub |
| `check FILE` | checks a dataset or a job before any GPU is paid for |
| `models pull`, `list`, `verify`, `quantize` | base models on this host |
| `migrate`, `doctor`, `run` | install the tables; check this host; run the daemon |
| `workers`, `drain`, `release-held` | hosts, and jobs that were queued before the installation |
| `serve` | the dashboard and the HTTP gateway: the older `/training/*` and serverless contracts, OpenAPI, `/metrics` |
| `fleet` | on any cheap host: starts a pod when no host can take the due jobs, and requeues the jobs of dead hosts |
| `demo`, `playground` | see one job from end to end; try the whole service on this machine |

Settings come from the environment or a `.env` file in the working folder; commands that only look need
`DATABASE_URL` alone. Every command takes `--help`; those that print data take `--json`, which prints one object a line.
A job is named by its id or its first characters, four or more.

Exit status: 0 success, 1 failure, 2 words that were not understood, 78 a configuration that cannot be used (the
supervisor does not start it again).

Signals to `run`: `TERM` or Ctrl-C shuts down. Each job saves a checkpoint and goes back to the queue, and the attempt
is not counted. A second one does not wait for the checkpoint. `USR1`, like `brightrun-trainer drain`, lets the running
jobs finish and claims nothing more.

Completion for your shell, once: `brightrun-trainer --install-completion` (bash, zsh, fish, PowerShell), or print it
with `--show-completion` and put it where you keep such things.
"""

_SETTINGS_HEAD = """\
# Configuration

Every setting is an environment variable, or a line of a file `.env` in the working directory. Only `DATABASE_URL` is
required. With `SUPABASE_URL` and `SUPABASE_SERVICE_ROLE_KEY` datasets and adapters are kept in Supabase Storage, else
in a folder. What a pod on RunPod needs is in the [operator's guide](../operators-guide.md#4-the-pod).

A configuration that cannot be used ends with exit code 78 and a list of all its faults, and the supervisor does not
start it again. `brightrun-trainer doctor` checks that what the settings name is there and works.

Made from `daemon/settings.py` by `tests/docs/render.py`; a test compares. A dash means: no default.
"""

_SETTINGS_TAIL = """
## Read by the image

Not by the daemon: the container and `supervisord.conf` use these.

| variable | default | meaning |
|---|---|---|
| `SERVE_GATEWAY` | `false` | `true` also runs `brightrun-trainer serve`, the gateway and dashboard, in the container |
| `SUPERVISOR_RUN_DIR` | `/run/brightrun` | supervisord's socket; `pod.log` if the container's output cannot be opened |
| `TRAINER_PYTHON` | `/opt/venv/bin/python` | the Python that runs the daemon |
| `RUNPOD_VOLUME_ID` | – | RunPod sets it where there is a network volume: the pod is then terminated, else stopped |
"""

_HYPERPARAMETERS_HEAD = """\
# Hyperparameters

The keys of the JSON column `hyperparameters`. Every key may be left out. Where several spellings are given, any works.
Unknown keys do not fail a job: they are reported among its events as `unknown_keys`. A value that cannot be used fails
the job with `invalid_spec`, and the message lists every such field.

How to choose them: [choose hyperparameters](../how-to/hyperparameters.md).

Made from `training/spec.py` by `tests/docs/render.py`; a test compares. A dash means: no default.
"""

_HTTP_HEAD = """\
# HTTP

What `brightrun-trainer serve` answers. Made from the code by `tests/docs/render.py`; a test compares. The whole
description with every field is served at `/openapi.json`, and for reading at `/docs`.

Callers send `Authorization: Bearer KEY`, one of `TRAINER_GATEWAY_KEYS`, except where it says *open*. Errors are JSON
problems (`error`, `hint`, `faults`); 401 without a key, 413 too large, 422 not understood, 429 too many, 503 while the
database is away. The dashboard is at `/dashboard` and signs in with the same keys; a single database reader pushes each
change to all browsers within a second.

A `job_id` in a submit is the id of a row, or an id of your own (any text of up to 200 characters). Your own id is
looked for among the jobs of `TRAINER_SERVICE_USER_ID` only, and `/status` and `/cancel` take it like the job's own.
**The row is what runs**: a submit changes nothing in a row that exists, and only gives a job without one its
`callback_url`. What the submit asks for and the row does not say stands in the answer's `notice`, which is absent if
they agree, and once in the job's story (`submit_differs`). Spellings, and the signature of a URL, make no difference.
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


def settings_page() -> str:
    parts = [_SETTINGS_HEAD]
    for heading, names in _groups(Settings).items():
        rows = "\n".join(
            f"| `{variable_of(name)}` | {_shown(Settings.model_fields[name].default)} "
            f"| {_meaning(Settings.model_fields[name])} |"
            for name in names
        )
        parts.append(f"\n## {heading}\n\n| variable | default | meaning |\n|---|---|---|\n{rows}\n")
    return "".join(parts) + _SETTINGS_TAIL


def variable_of(setting: str) -> str:
    """The environment variable of a field of Settings."""
    return next(iter(_aliases(Settings.model_fields[setting])), f"TRAINER_{setting.upper()}")


def _groups(model: type[BaseModel]) -> dict[str, list[str]]:
    """The fields under each comment that heads a group of them in the class, or in one that it is made from."""
    groups: dict[str, list[str]] = {}
    heading = ""
    ours = [each for each in model.mro() if issubclass(each, BaseModel) and each.__module__.startswith("daemon.")]
    for line in (line for each in ours for line in inspect.getsource(each).splitlines()):
        if comment := re.match(r" {4}# (.+)\.$", line):
            heading = comment[1]
        elif (field := re.match(r" {4}(\w+): ", line)) and field[1] in model.model_fields:
            groups.setdefault(heading, []).append(field[1])
    return groups


def hyperparameters_page() -> str:
    rows = []
    for name, field in Hyperparameters.model_fields.items():
        spellings = " or ".join(f"`{alias}`" for alias in (_aliases(field) or [name]))
        rows.append(f"| {spellings} | {_shown(field.default)} | {_meaning(field)} |")
    return f"{_HYPERPARAMETERS_HEAD}\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _aliases(field: FieldInfo) -> list[str]:
    alias = field.validation_alias
    return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []


def _meaning(field: FieldInfo) -> str:
    """The description; and where it does not name all words that may be chosen, these."""
    text = field.description or ""
    kinds = () if get_origin(field.annotation) is tuple else (field.annotation, *get_args(field.annotation))
    choices = [f"`{word}`" for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    if not all(choice in text for choice in choices):
        text += f"; one of {', '.join(choices)}"
    return _cell(text)


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "–"
    if value is PydanticUndefined:
        return "**required**"
    if isinstance(value, tuple):
        return f"`{','.join(value)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _openapi() -> dict[str, Any]:
    """The gateway's own description; nothing is connected to for it."""
    from daemon.gateway.app import build_app
    from daemon.gateway.dashboard.broadcaster import Feed
    from daemon.gateway.job_rows import GatewayRows
    from daemon.gateway.metrics import ServiceMetrics
    from daemon.read_settings import load_settings

    nowhere = "postgresql://nobody@127.0.0.1:1/none"
    settings = load_settings(database_url=nowhere, gateway_keys=("0123456789abcdef",), storage="folder")
    rows = GatewayRows(settings)
    return build_app(settings, rows, ServiceMetrics(rows), Feed(nowhere), asyncio.Event()).openapi()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


PAGES = {
    "reference/cli.md": cli_page,
    "reference/configuration.md": settings_page,
    "reference/http.md": http_page,
    "reference/hyperparameters.md": hyperparameters_page,
}

if __name__ == "__main__":
    os.environ.setdefault("COLUMNS", "100")
    for name, render in PAGES.items():
        (DOCS / name).write_text(render(), encoding="utf-8")
