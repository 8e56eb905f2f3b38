"""The borders of the design, seen from a fresh interpreter."""

from __future__ import annotations

import json
import subprocess
import sys

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


def test_the_whole_service_stays_light() -> None:
    names, _seconds, resident = modules_after("import daemon.service, daemon.host")
    assert not names.intersection(HEAVY)
    assert resident < 120


def test_the_bridge_needs_the_standard_library_and_pydantic_only() -> None:
    names, _seconds, _resident = modules_after("import training.spec, training.events")
    assert not names.intersection({*HEAVY, "httpx", "psycopg", "structlog", "rich"})
