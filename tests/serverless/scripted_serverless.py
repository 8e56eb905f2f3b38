"""The real serverless worker with the scripted trainer in place of the real one."""

from __future__ import annotations

import sys

from daemon.errors import EXIT_UNFIT, HostUnfit
from daemon.serverless.__main__ import start
from tests.paths import SCRIPTED_TRAINER

if __name__ == "__main__":
    try:
        start((sys.executable, str(SCRIPTED_TRAINER)))
    except HostUnfit as unfit:
        print(unfit, file=sys.stderr)
        sys.exit(EXIT_UNFIT)
