"""The demo's output for programs: what the screen shows, as one JSON object per line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

from daemon.demo.errors import DemoFailed
from daemon.demo.screen import Screen
from daemon.job_view.output import JobsView, JsonLines
from daemon.sentence import as_sentence
from daemon.terminal.console import console, print_json


class JsonScreen(Screen):
    """Each line has a `kind`: say, step, sql, row, answers, result, failure, event or job."""

    def __init__(self) -> None:
        super().__init__(console())

    def say(self, words: str) -> None:
        _line("say", text=words.strip())

    def step(self, words: str) -> None:
        _line("step", text=words)

    def sql(self, statement: str) -> None:
        _line("sql", text=statement)

    def row(self, row: Mapping[str, Any]) -> None:
        _line("row", **{name: float(value) if isinstance(value, Decimal) else value for name, value in row.items()})

    def answers(self, question: str, before: str, after: str) -> None:
        _line("answers", question=question, before=before, after=after)

    def result(self, words: str) -> None:
        _line("result", text=words)

    def failure(self, failed: DemoFailed) -> None:
        _line("failure", text=as_sentence(failed.message), detail=failed.detail)

    def blank(self) -> None:
        """Prints nothing: a program needs no blank lines."""

    @contextmanager
    def view(self) -> Iterator[JobsView]:
        yield JsonLines(lambda name, value: _line(name, **{name: value}))


def _line(kind: str, **fields: Any) -> None:
    print_json({"kind": kind, **fields})
