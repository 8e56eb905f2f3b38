"""Shows the progress of long transfers in bytes: a bar on a terminal, elsewhere a line at each tenth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from daemon.terminal.console import console, say_aside
from daemon.terminal.format import size
from daemon.terminal.sanitize import plain

OnBytes = Callable[[int, int], None]  # bytes done, total bytes


@contextmanager
def transfer_bar(name: str, *, shown: bool, verb: str = "fetching") -> Iterator[OnBytes]:
    """Yields a function that takes (done, total). Writes to stderr, so that the answer on stdout stays clean."""
    if not shown:
        yield lambda _done, _total: None
        return
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield _tenths(name, verb)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task(f"{verb} {plain(name)}", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _tenths(name: str, verb: str) -> OnBytes:
    told = -1

    def on_bytes(done: int, total: int) -> None:
        nonlocal told
        tenth = 10 * done // total if total else 0
        if tenth > told:
            told = tenth
            say_aside(f"{verb} {plain(name)}: {size(done)} of {size(total)}")

    return on_bytes
