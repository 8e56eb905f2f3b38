"""The terminal's picture in docs/how-to/try-it.md: `make demo` played for real, its moving part at one moment.

PYTHONPATH=. python docs/images/terminal.py     # minutes; writes docs/images/terminal.svg
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, RenderableType
from rich.terminal_theme import MONOKAI

from daemon.demo.run import run_demo
from daemon.demo.screen import Screen
from daemon.job_view.output import JobsView
from daemon.job_view.picture import picture
from daemon.job_view.reads import Event
from daemon.job_view.watched_jobs import WatchedJob

WIDTH = 104
# Late enough for a curve, early enough for a bar that is not full.
SHOWN_PROGRESS = 72.0
# A picture fetches nothing: rich's own format names a server for its font.
FORMAT = re.sub(r"@font-face {{.*?}}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace(
    "Fira Code, monospace", "Fira Code, Menlo, Consolas, DejaVu Sans Mono, monospace"
)


class RecordedScreen(Screen):
    """Prints the moving part once, as it was when the bar passed SHOWN_PROGRESS."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._recorder = console

    @contextmanager
    def view(self) -> Iterator[JobsView]:
        moment = _Moment()
        yield moment
        if moment.drawn is not None:
            self._recorder.print(moment.drawn)


class _Moment:
    def __init__(self) -> None:
        self.drawn: RenderableType | None = None
        self._progress = 0.0

    def show(self, jobs: Sequence[WatchedJob], news: Sequence[Event], notice: str | None) -> None:
        del news
        if self._progress < SHOWN_PROGRESS:
            self.drawn, self._progress = picture(jobs, width=WIDTH, height=40, notice=notice), jobs[0].row.progress


def main() -> int:
    # Into memory: a terminal of this very width, whoever runs the script.
    console = Console(record=True, force_terminal=True, color_system="truecolor", width=WIDTH, file=io.StringIO())
    status = run_demo(None, screen=RecordedScreen(console))
    if status != 0:
        sys.stderr.write(console.export_text())
        return status
    goal = Path(__file__).with_name("terminal.svg")
    drawn = console.export_svg(title="make demo", theme=MONOKAI, code_format=FORMAT, unique_id="demo")
    # A line with a shorter path is a shorter line.
    drawn = re.sub(r' textLength="[^"]*"(?=[^>]*>[^<]*~/)', "", drawn.replace(str(Path.home()), "~"))
    goal.write_text(drawn, encoding="utf-8")
    sys.stdout.write(f"{goal}: {goal.stat().st_size / 1000:.0f} kB\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
