"""The fenced blocks of every page: what a reader may copy, and whether it is run or says why not."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

# What a block may say behind its language instead of being run.
REASONS = {
    "needs-pod": "acts on RunPod, or on a host with a card",
    "needs-project": "acts on a Supabase project, or on a part of it that a plain Postgres lacks",
    "needs-checkout": "changes the reader's shell or checkout",
    "takes-minutes": "installs, downloads or trains; what it starts has tests of its own",
    "in-playground": "needs `make playground` beside it; tests/lifecycle/test_demo.py runs it in one",
    "serves": "does not end by itself; tests/lifecycle and tests/gateway start it",
    "no-run": "needs a package or a model that the tests do not have",
}

# Pages whose blocks of a language another test takes from the page and runs.
ELSEWHERE = {
    ("docs/cookbook.md", "sql"): "tests/docs/test_cookbook.py",
    ("docs/for-app-developers.md", "json"): "tests/docs/test_for_app_developers.py",
    ("docs/for-app-developers.md", "python"): "tests/docs/test_for_app_developers.py",
    ("docs/how-to/compare.md", "sh"): "tests/cli/test_compare.py",
    ("docs/how-to/deploy.md", "sh"): "tests/docs/test_deploy.py",
    ("docs/how-to/deploy.md", "sql"): "tests/docs/test_deploy.py",
    ("docs/how-to/export.md", "sh"): "tests/cli/test_export.py",
    ("docs/how-to/fronts.md", "sh"): "tests/fronts/test_page.py",
    ("docs/how-to/fronts.md", "sql"): "tests/fronts/test_page.py",
    ("docs/how-to/restoring.md", "sh"): "tests/docs/test_restoring.py",
    ("docs/how-to/serve-your-adapter.md", "python"): "tests/docs/test_serve_your_adapter.py",
    ("docs/how-to/serve-your-adapter.md", "sh"): "tests/docs/test_serve_your_adapter.py",
    ("docs/operators-guide.md", "json"): "tests/contract/test_operators_guide.py",
}
RUN = ("sh", "sql", "python", "json")
# Compared with the example project, which is type-checked: tests/docs/test_typescript.py.
COMPARED = ("ts",)


@dataclass(frozen=True)
class Block:
    """`reason` is one of REASONS, or empty for a block that is to be run."""

    page: str
    line: int
    language: str
    reason: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    docs = [path for path in (ROOT / "docs").rglob("*.md") if "node_modules" not in path.parts]
    return sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *docs])


def blocks() -> list[Block]:
    found = []
    for path in pages():
        content = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```$", content, re.MULTILINE | re.DOTALL):
            language, _, reason = match[2].strip().partition(" ")
            line = content.count("\n", 0, match.start()) + 1
            found.append(Block(str(path.relative_to(ROOT)), line, language, reason.strip(), textwrap.dedent(match[3])))
    return found


def runnable(page: str | None = None) -> list[Block]:
    """Blocks that test_commands.py runs, in the order of their page."""
    return [
        block
        for block in blocks()
        if block.language in RUN
        and not block.reason
        and (block.page, block.language) not in ELSEWHERE
        and page in (None, block.page)
    ]
