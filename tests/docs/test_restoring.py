"""The page on restoring, run block by block: one server to dump, and one that has never heard of our role."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psycopg

from daemon.database.embedded_server import EmbeddedPostgres, installed_binaries, wheel_binaries
from daemon.schema.migrations import bring_up_to_date, faults
from tests.docs.blocks import blocks
from tests.docs.test_commands import shell
from tests.postgres import AppDatabase
from tests.schema.test_restored import fill

PAGE = "docs/how-to/restoring.md"


def test_the_page_on_restoring_leads_where_it_says(tmp_path: Path) -> None:
    folder = installed_binaries() or wheel_binaries()
    assert folder is not None
    script = "\n".join(block.text for block in blocks() if block.page == PAGE and block.language == "sh")
    with EmbeddedPostgres(folder) as old, EmbeddedPostgres(folder) as new:
        bring_up_to_date(old.dsn(), local=True)
        running, _worker = asyncio.run(fill(old.dsn()))
        with psycopg.connect(old.dsn(), autocommit=True) as admin:
            admin.execute("UPDATE training_leases SET expires_at = now() - interval '1 h'")
            admin.execute("CREATE DATABASE rows")
        bring_up_to_date(old.dsn("rows"), local=True)
        said = shell(
            tmp_path,
            script,
            150,
            PATH=f"{tmp_path / 'bin'}:{folder}:{os.environ['PATH']}",
            OLD_URL=old.dsn(),
            ADMIN_URL=old.dsn(),
            NEW_URL=new.dsn(),
            EMPTY_URL=old.dsn("rows"),
            DAEMON_PASSWORD="not-a-secret",
        )
        assert "repaired: " in said and "already up to date" in said, said
        assert 'role "training_daemon" does not exist' in (tmp_path / "restore.log").read_text()
        for restored in (new.dsn(), old.dsn("rows")):
            assert faults(restored) == []
            app = AppDatabase(restored)
            assert (app.job(running)["status"], app.job(running)["attempt"]) == ("queued", 0)
            app.close()
