"""What must hold over a whole day of a fleet, whatever went wrong in it."""

from __future__ import annotations

import pytest

from tests.doubles.runpod_api import RunPodDouble
from tests.fleet.day import Day, table
from tests.fleet.yard import Yard
from tests.postgres import AppDatabase


@pytest.mark.system
@pytest.mark.timeout(300)
async def test_a_day_ends_with_every_job_done_and_no_pod_paid_for_in_vain(
    database: AppDatabase, runpod: RunPodDouble
) -> None:
    day = Day(Yard(database, runpod, fleet_max_pods=3, fleet_overstay_minutes=40))
    await day.run()
    said = table(day)
    statuses = [row["status"] for row in database.run("SELECT status FROM training_jobs ORDER BY queued_at")]
    assert statuses.count("completed") == len(day.durations) and statuses.count("queued") == 1, said
    assert runpod.billing == [], said
    assert day.most_pods == 3, said
    endings = [row["ending"] for row in database.run("SELECT ending FROM training_pods")]
    for ending in ("gone", "never_reported", "no_capacity", "overstayed"):
        assert ending in endings, said
    assert {"adopt", "limit", "unservable"} <= {line["decision"] for line in day.yard.story()}, said
    # The night between two jobs costs nothing: fewer than two thirds of an always-on pod's hours in all.
    assert day.pod_minutes < 24 * 60, said
