"""A day of the fleet loop in about half a minute: every decision with its reason, the jobs' waiting times, the cost.

It prints the same day that tests/fleet/test_day.py checks.

    python benchmarks/fleet_day.py
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import structlog

from tests.doubles.runpod_api import RunPodDouble
from tests.fleet.day import Day, table
from tests.fleet.yard import Yard
from tests.postgres import AppDatabase, migrated, open_server


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    with open_server() as server, server.database() as name, RunPodDouble() as runpod:
        migrated(server, name)
        day = Day(Yard(AppDatabase(server.dsn(name)), runpod, fleet_max_pods=3, fleet_overstay_minutes=40))
        begun = time.perf_counter()
        asyncio.run(day.run())
        print(table(day))
        print(f"\n1,440 looks in {time.perf_counter() - begun:.0f} s on {server.description}")


if __name__ == "__main__":
    main()
