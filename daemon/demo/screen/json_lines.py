"""The demo's output for programs: what the screen shows, as one JSON object per line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from decimal import Decimal
from typing import Any

from daemon.demo.errors import DemoFailed
from daemon.demo.job import JobView
from daemon.demo.screen.live import Picture, Screen
from daemon.sentence import as_sentence
from daemon.terminal.console import console, print_json


class JsonScreen(Screen):
    """Each line has a `kind`: say, step, sql, row, answers, result, failure, event (of the job) or standing."""

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
    def picture(self) -> Iterator[Picture]:
        yield _JsonPicture()


class _JsonPicture:
    """Prints each new event, and the row whenever it changed."""

    def __init__(self) -> None:
        self._told = 0
        self._standing: object = None

    def show(self, view: JobView) -> None:
        for event in view.story:
            if event.id > self._told:
                self._told = event.id
                _line("event", id=event.id, at=event.at, event=event.kind, message=event.message, data=event.data)
        if view.standing != self._standing:
            self._standing = view.standing
            _line("standing", **asdict(view.standing))


def _line(kind: str, **fields: Any) -> None:
    print_json({"kind": kind, **fields})
