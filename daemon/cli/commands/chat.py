"""Chats with a base model and its adapter side by side, in a trainer process: torch is never imported here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.data.trainer_process import trainer_environment
from daemon.cli.errors import CommandFailed

if TYPE_CHECKING:
    from daemon.base_model.candidates import ResolvedModel
    from daemon.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per answer.")]

# Side by side needs two columns, each wide enough for a sentence.
_WIDE = 100
_STDERR_TAIL_BYTES = 4000


def chat(
    what: Annotated[str, typer.Argument(metavar="ID|FOLDER", help="A completed job, or an adapter's folder.")],
    ask: Annotated[list[str] | None, typer.Option("--ask", "-q", help="Ask this and exit; may be repeated.")] = None,
    model: Annotated[Path | None, typer.Option(help="The base model's folder; default: found by its name.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest answer, in tokens.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Talk to the base model and the adapter side by side. An empty line or Ctrl-D ends it; /new starts again."""
    from daemon.terminal.console import console, say_aside

    adapter = adapter_folder(what)
    model_dir = model or find_base_model(adapter).path
    if not (model_dir / "config.json").is_file():
        raise CommandFailed(f"the folder {model_dir} holds no model: there is no config.json in it")
    with _chat_process(model_dir, adapter, max_tokens) as chat:
        with console(stderr=True).status(f"loading {model_dir.name} …"):
            chat.wait_until_ready()
        if not as_json:
            say_aside(f"base model {model_dir.name}, adapter {adapter}")
        for question in _questions(ask):
            if question == "/new":
                chat.forget()
                continue
            with console(stderr=True).status("thinking …"):
                base, adapted = chat.ask(question)
            _show(question, base, adapted, as_json)


class ChatProcess:
    """Sends a line of JSON to the process and reads lines of JSON. Raises CommandFailed if the process has ended."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        self._process = process
        self._stderr = stderr

    def wait_until_ready(self) -> None:
        self._read("ready")

    def ask(self, question: str) -> tuple[str, str]:
        """The base model's answer and the adapter's."""
        self._write({"question": question})
        return self._read("answer")["text"], self._read("answer")["text"]

    def forget(self) -> None:
        self._write({"forget": True})

    def _write(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def _read(self, kind: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        said: dict[str, Any] = json.loads(line)
        if said["kind"] == "failed":
            raise CommandFailed(said["message"], said.get("hint"))
        assert said["kind"] == kind, said
        return said

    def _gone(self) -> CommandFailed:
        status = self._process.wait()
        self._stderr.seek(0)
        tail = self._stderr.read()[-_STDERR_TAIL_BYTES:].decode(errors="replace").strip().splitlines()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
        return CommandFailed(f"the model's process {how}" + (f": {tail[-1]}" if tail else ""))


@contextmanager
def _chat_process(model_dir: Path, adapter: Path, max_tokens: int) -> Iterator[ChatProcess]:
    import tempfile

    command = [sys.executable, "-m", "training.adapter.chat_process", str(model_dir.resolve()), str(adapter.resolve())]
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            [*command, "--max-new-tokens", str(max_tokens)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=trainer_environment(),
        ) as process,
    ):
        try:
            yield ChatProcess(process, stderr)
        finally:
            # It has nothing to save.
            process.kill()


def _questions(given: list[str] | None) -> Iterator[str]:
    """The questions from --ask, else typed ones, else the lines of a pipe."""
    if given:
        yield from given
        return
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    # For arrow keys and a history, if the platform has readline.
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            question = input("you › ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not question:
            return
        yield question


def _show(question: str, base: str, adapted: str, as_json: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    from daemon.terminal.console import console, facts_table, print_json
    from daemon.terminal.sanitize import plain_lines

    if as_json:
        print_json({"question": question, "base": base, "adapter": adapted})
        return
    screen = console()
    words, new_words = Text(plain_lines(base)), Text(plain_lines(adapted), style="green")
    if screen.width >= _WIDE and screen.is_terminal:
        table = Table(box=None, expand=True, padding=(0, 2, 1, 0), header_style="dim")
        table.add_column("without the adapter", ratio=1)
        table.add_column("with the adapter", ratio=1)
        table.add_row(words, new_words)
    else:
        table = facts_table()
        table.add_row("without", words)
        table.add_row("with", new_words)
    screen.print(table)


def adapter_folder(what: str) -> Path:
    """The folder itself, or a completed job's adapter, downloaded once and kept in the cache."""
    folder = Path(what)
    if folder.is_dir():
        if not (folder / "adapter_config.json").is_file():
            raise CommandFailed(f"the folder {folder} holds no adapter: there is no adapter_config.json in it")
        return folder
    from daemon.cli.commands.adapters import completed_job, kept_adapter
    from daemon.cli.data.connection import open_database
    from daemon.cli.data.queries import find_job, job_digits
    from daemon.cli.errors import Misused

    try:
        job_digits(what)
    except Misused as error:
        raise Misused(f"{what[:80]!r} is neither an adapter's folder nor a job's id", error.hint) from None
    with open_database() as connection:
        row, details = completed_job(connection, find_job(connection, what))
    return kept_adapter(row, details)


def find_base_model(adapter: Path) -> ResolvedModel:
    """Finds the model that the adapter was trained on, by the name in its config. Never downloads."""
    import asyncio

    from daemon.base_model.candidates import ResolvedModel
    from daemon.base_model.resolve import resolve_model
    from daemon.cli.commands.models import model_settings
    from daemon.demo.model import models_folder
    from daemon.errors import JobFailed
    from daemon.logs import configure_logs
    from daemon.read_settings import secrets_of
    from training.events import ErrorCode

    name = base_model_name(adapter)
    settings: Settings = model_settings().model_copy(update={"model_downloads": False, "allowed_models": ()})
    configure_logs("error", secrets=secrets_of(settings))
    try:
        return asyncio.run(resolve_model(name, settings))
    except JobFailed as failed:
        # The demo keeps its model in its own cache.
        demo = models_folder() / name.rpartition("/")[2]
        if (demo / "config.json").is_file():
            return ResolvedModel(name, demo, None, "models_dir")
        if failed.code is ErrorCode.MODEL_NOT_FOUND:
            # Who types this is at the host, and may have the model elsewhere.
            failed.hint = f"Run `brightrun-trainer models pull {name}`, or name the model's folder with --model."
        raise failed


def base_model_name(adapter: Path) -> str:
    try:
        name = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name:
        raise CommandFailed(
            f"the adapter {adapter} does not say which base model it belongs to", "name its folder with --model"
        )
    return name
