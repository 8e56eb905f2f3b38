"""The real gateway as a process of its own."""

from __future__ import annotations

import asyncio
import sys

from daemon.errors import EXIT_UNFIT, HostUnfit
from daemon.gateway.server import serve_gateway
from daemon.read_settings import load_settings

if __name__ == "__main__":
    try:
        asyncio.run(serve_gateway(load_settings()))
    except HostUnfit as unfit:
        print(unfit, file=sys.stderr)
        sys.exit(EXIT_UNFIT)
