"""The borders of the design, seen from a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pkgutil import iter_modules

import training.files

HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate", "runpod", "numpy")


def modules_after(statement: str) -> tuple[set[str], float, float]:
    """Module names, seconds of this process on a core and resident MiB after a statement in a fresh interpreter."""
    script = (
        "import sys, time, json; begun = time.process_time()\n"
        f"{statement}\n"
        "seconds = time.process_time() - begun\n"
        "resident = int(open('/proc/self/statm').read().split()[1]) * 4096 / 2**20\n"
        "print(json.dumps([sorted(sys.modules), seconds, resident]))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    names, seconds, resident = json.loads(output)
    return set(names), seconds, resident


def test_importing_the_daemon_loads_nothing_heavy_and_takes_little_work() -> None:
    names, seconds, _resident = modules_after("import daemon.__main__")
    assert not names.intersection(HEAVY)
    assert seconds < 2.0


def test_no_command_that_looks_at_jobs_loads_anything_heavy() -> None:
    """Each is called to where it would ask the database, which is nowhere."""
    words = (
        "jobs",
        "show abcd",
        "watch",
        "events abcd",
        "logs abcd",
        "cancel abcd",
        "workers",
        "models list",
        "--help",
    )
    statement = (
        "import os, contextlib, io; from daemon.__main__ import main\n"
        "os.environ.update(DATABASE_URL='postgresql://127.0.0.1:1/x', TRAINER_MODELS_DIR='/nowhere', "
        "TRAINER_WORK_DIR='/nowhere')\n"
        f"for words in {words!r}:\n"
        "    sys.argv[1:] = words.split()\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()): main()\n"
    )
    names, _seconds, _resident = modules_after(statement)
    assert "daemon.cli.data.connection" in names
    assert not names.intersection(HEAVY)


def test_the_whole_service_stays_light() -> None:
    names, _seconds, resident = modules_after("import daemon.service, daemon.host.inspect")
    assert not names.intersection(HEAVY)
    assert resident < 120


def test_the_bridge_needs_the_standard_library_and_pydantic_only() -> None:
    rooms = ", ".join(f"training.files.{module.name}" for module in iter_modules(training.files.__path__))
    names, _seconds, _resident = modules_after(f"import training.spec, training.events, {rooms}")
    assert not names.intersection({*HEAVY, "httpx", "psycopg", "structlog", "rich"})
