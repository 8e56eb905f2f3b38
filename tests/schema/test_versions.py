"""The core of the SQL, run once on each PostgreSQL: what is not here is brought by npm. `make test-system` runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT
from tests.postgres_versions import VERSIONS, VersionMissing, binaries_of

pytestmark = pytest.mark.system

# Migrations, guard, claim, lease, announcing, lints, a front.
CORE = (
    "tests/schema/test_migrations.py",
    "tests/sql/test_announce.py",
    "tests/sql/test_guard.py",
    "tests/sql/test_lints.py",
    "tests/queue/test_claim.py",
    "tests/queue/test_lease.py",
    "tests/fronts/test_insert.py",
    "tests/fronts/test_life.py",
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_core_holds_on_each_version(version: int) -> None:
    try:
        binaries_of(version)
    except VersionMissing as missing:
        pytest.skip(str(missing))
    # A given server would be used whatever the version.
    environment = {name: value for name, value in os.environ.items() if name != "TEST_DATABASE_URL"}
    environment["TEST_POSTGRES"] = str(version)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "not system and not gpu", *CORE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"(PostgreSQL) {version}." in done.stdout
