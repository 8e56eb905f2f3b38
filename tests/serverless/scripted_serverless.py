"""The real serverless worker with the scripted trainer in place of the real one."""

from __future__ import annotations

import sys

from daemon.errors import EXIT_UNFIT, HostUnfit
from daemon.serverless.__main__ import start
from tests.paths import SCRIPTED_TRAINER


def prepare() -> None:
    """Imports what runpod imports, and not runpod: its modules read their addresses from the environment."""
    import cpuinfo
    import runpod  # noqa: F401

    for name in [name for name in sys.modules if name.partition(".")[0] == "runpod"]:
        del sys.modules[name]
    # runpod asks when it is imported, and the answer comes from another process.
    known = cpuinfo.get_cpu_info()
    cpuinfo.get_cpu_info = lambda: known


if __name__ == "__main__":
    try:
        start((sys.executable, str(SCRIPTED_TRAINER)))
    except HostUnfit as unfit:
        print(unfit, file=sys.stderr)
        sys.exit(EXIT_UNFIT)
else:
    prepare()
