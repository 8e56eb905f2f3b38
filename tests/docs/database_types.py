"""The TypeScript types of the schema, made by Supabase's own CLI from a migrated database.

`make types` writes them; a test compares. Neither Docker nor a Supabase project is needed.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from daemon.database.embedded_server import EmbeddedPostgres
from daemon.schema.migrations import migrate
from tests.docs.npm import installed
from tests.paths import ROOT

TYPES = ROOT / "docs" / "examples" / "nextjs" / "lib" / "database.types.ts"
TOOLS = {"supabase": "3.1.0", "prettier": "3.10.1"}
HEADER = "// Generated from sql/migrations by `make types`: do not edit. Copy it into your app as it is.\n\n"


def generated(dsn: str) -> str:
    """The file's text for the `public` schema of a database."""
    commands = installed(TOOLS, optional=True) / ".bin"
    environment = {**os.environ, "PGSSLMODE": "disable", "DO_NOT_TRACK": "1"}
    made = _run(
        [str(commands / "supabase"), "gen", "types", "--lang=typescript", "--schema=public", f"--db-url={dsn}"],
        environment,
    )
    # The CLI speaks of its connection before it begins.
    _, begin, rest = made.partition("export type Json")
    if not begin:
        raise RuntimeError(f"supabase gen types wrote no types: {made[:500]}")
    style = ["--parser=typescript", "--no-semi", "--single-quote", "--print-width=120"]
    return _run([str(commands / "prettier"), *style], environment, HEADER + begin + rest)


def _run(command: list[str], environment: dict[str, str], text: str = "") -> str:
    run = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {run.stderr[-2000:]}")
    return run.stdout


def write() -> None:
    with EmbeddedPostgres() as server:
        migrate(server.dsn(), local=True)
        TYPES.write_text(generated(server.dsn()))
    print(f"wrote {TYPES.relative_to(ROOT)}")


if __name__ == "__main__":
    write()
