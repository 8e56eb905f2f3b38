"""From events to rows: what the app reads while a job trains. A real store on a real Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import pytest

from daemon.database.connection import Database
from daemon.errors import LeaseLost
from daemon.host.gpu_load import read_load
from daemon.host.gpus import Gpu
from daemon.queue.job import ClaimedJob, Lease
from daemon.queue.rows import Limits
from daemon.queue.sql_job_store import SqlJobStore
from daemon.report.cost import CostMeter
from daemon.report.reporter import Reporter
from tests.postgres import AppDatabase
from training import events
from training.events import Stage


@dataclass
class Claimed:
    """A claimed job, its reporter, and how often a write was refused."""

    app: AppDatabase
    store: SqlJobStore
    job: ClaimedJob
    refusals: list[None] = field(default_factory=list)

    @property
    def id(self) -> UUID:
        return self.job.id

    def reporter(self, price: float | None = None, *, most_points: int = 0) -> Reporter:
        meter = CostMeter(price=price, num_gpus=1, already_spent=0.0)
        refused = lambda: self.refusals.append(None)  # noqa: E731
        return Reporter(self.store, self.job.lease, meter=meter, on_refused=refused, most_points=most_points)

    def planned(self, **changes: object) -> events.Planned:
        said: dict[str, object] = {
            "job_id": str(self.id), "total_steps": 10, "total_epochs": 2, "train_examples": 9, "validation_examples": 1,
            "train_tokens": 900, "trained_tokens": 300, "max_length": 64,
            "trained_with": {"base_model": "acme/tiny", "hyperparameters": {"learning_rate": 2e-4, "packing": None}},
        }  # fmt: skip
        return events.Planned.model_validate(said | changes)

    async def claim_again(self) -> None:
        await self.store.release_job(self.job.lease, "x", cost=None)
        claim = await self.store.claim_job(uuid4(), Limits(), lease_seconds=60)
        assert claim.job is not None
        self.job = claim.job

    def step(self, number: int, total: int = 10, **changes: object) -> events.Progress:
        said: dict[str, object] = {
            "job_id": str(self.id),
            "step": number,
            "total_steps": total,
            "epoch": number / total,
            "loss": 2.0,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "tokens_per_second": 50.0,
        }
        return events.Progress.model_validate(said | changes)

    def points(self) -> list[dict[str, object]]:
        return self.app.run("SELECT * FROM metrics_points WHERE job_id = %s ORDER BY step", (self.id,))


@pytest.fixture
async def claimed(database: AppDatabase) -> AsyncIterator[Claimed]:
    user_id = database.insert_user()
    database.insert_job(user_id, database.insert_dataset(user_id))
    async with Database(database.dsn, application_name="test") as connection:
        store = SqlJobStore(connection)
        claim = await store.claim_job(uuid4(), Limits(), lease_seconds=60)
        assert claim.job is not None
        yield Claimed(database, store, claim.job)


async def test_the_first_step_makes_the_job_running_and_steps_make_points(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    reporter.enter(Stage.LOADING)
    await reporter.flush()
    assert claimed.app.job(claimed.id)["status"] == "initializing"
    for number in (1, 2, 3):
        reporter.report(claimed.step(number))
    await reporter.flush()
    row = claimed.app.job(claimed.id)
    assert (row["status"], row["current_stage"], row["current_step"]) == ("running", "training", 3)
    assert float(row["progress"]) == 5 + 90 * 0.3
    assert [point["step"] for point in claimed.points()] == [1, 2, 3]
    metrics = row["current_metrics"]
    assert metrics["training_loss"] == 2.0
    # A page finds each of its keys, also what is not known yet or not on this host.
    assert metrics["validation_loss"] is metrics["gpu_utilization"] is None


async def test_the_row_names_its_base_model_before_its_first_step_binds_later_attempts_to_it(
    claimed: Claimed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine model and first step may be told while the words before them are still being written."""
    reporter = claimed.reporter()
    record_event, start_job = claimed.store.record_event, claimed.store.start_job
    named: list[object] = []

    async def slowly(*given: Any) -> None:
        await record_event(*given)
        monkeypatch.setattr(claimed.store, "record_event", record_event)
        reporter.train_with({"base_model": "acme/other"})
        reporter.report(claimed.step(1))

    async def watched(lease: Lease) -> None:
        named.append(claimed.app.job(claimed.id)["base_model"])
        await start_job(lease)

    monkeypatch.setattr(claimed.store, "record_event", slowly)
    monkeypatch.setattr(claimed.store, "start_job", watched)
    reporter.tell("notice", "Something comes first.")
    await reporter.flush()
    assert named == ["acme/other"] and claimed.app.job(claimed.id)["status"] == "running"


async def test_many_events_become_one_write_of_the_row_a_second(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    claimed.app.run(
        "CREATE TABLE written (at timestamptz); "
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS "
        "$$ BEGIN INSERT INTO public.written VALUES (clock_timestamp()); RETURN NULL; END $$; "
        "CREATE TRIGGER zz_note AFTER UPDATE ON training_jobs FOR EACH ROW EXECUTE FUNCTION note()"
    )
    writing = asyncio.create_task(reporter.run())
    for number in range(1, 251):
        reporter.report(claimed.step(number, total=1000))
        await asyncio.sleep(0.01)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    await reporter.flush()
    written = claimed.app.one("SELECT count(*) AS count FROM written")["count"]
    # Two and a half seconds or a little more: start, about one write a second, the last flush.
    assert written <= 8
    assert len(claimed.points()) == 250


async def test_numbers_of_any_size_never_break_the_stream(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    huge = [
        claimed.step(1, grad_norm=1e30),
        claimed.step(2, loss=1e12),
        claimed.step(3, loss="NaN"),
        claimed.step(4, grad_norm="Infinity", tokens_per_second=0.0),
        claimed.step(5),
    ]
    for event in huge:
        reporter.report(event)
    await reporter.flush()
    points = {point["step"]: point for point in claimed.points()}
    assert set(points) == {1, 2, 4, 5}
    assert points[1]["gradient_norm"] is None and points[4]["gradient_norm"] is None
    assert claimed.app.job(claimed.id)["current_step"] == 5
    assert "notice" in claimed.app.story(claimed.id)


async def test_a_validation_loss_joins_its_step_point(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    reporter.report(claimed.step(4))
    await reporter.flush()
    reporter.report(events.Evaluated(job_id=str(claimed.id), step=4, epoch=1.0, validation_loss=1.25))
    await reporter.flush()
    (point,) = claimed.points()
    assert float(str(point["validation_loss"])) == 1.25 and float(str(point["training_loss"])) == 2.0


async def test_a_resume_forgets_the_points_after_its_checkpoint(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    for number in range(1, 6):
        reporter.report(claimed.step(number))
    await reporter.flush()
    reporter.report(events.Notice(job_id=str(claimed.id), code="resumed", message="…", data={"step": 2}))
    reporter.report(claimed.step(3, loss=9.0))
    await reporter.flush()
    assert [(point["step"], float(str(point["training_loss"]))) for point in claimed.points()] == [
        (1, 2.0),
        (2, 2.0),
        (3, 9.0),
    ]


async def test_progress_never_falls_within_an_attempt(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    reporter.report(claimed.step(8))
    await reporter.flush()
    reporter.report(claimed.step(2))
    await reporter.flush()
    assert float(claimed.app.job(claimed.id)["progress"]) == 5 + 90 * 0.8


async def test_the_cost_grows_with_the_hosts_price_and_the_estimate_is_corrected(claimed: Claimed) -> None:
    reporter = claimed.reporter(price=3600.0)
    reporter.report(
        events.Planned(
            job_id=str(claimed.id), total_steps=10, total_epochs=2, train_examples=9, validation_examples=1,
            train_tokens=900, trained_tokens=300, max_length=64,
        )
    )  # fmt: skip
    reporter.report(claimed.step(1))
    await asyncio.sleep(0.2)
    reporter.report(claimed.step(2))
    await reporter.flush()
    row = claimed.app.job(claimed.id)
    assert (row["total_steps"], row["total_epochs"]) == (10, 2)
    assert float(row["current_cost"]) >= 0.2
    assert float(row["estimated_total_cost"]) > float(row["current_cost"])
    assert row["estimated_completion_at"] is not None


async def test_the_plan_says_how_many_answers_and_conversations_are_held_out(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    planned = events.Planned(
        job_id=str(claimed.id), total_steps=10, total_epochs=2, train_examples=108, validation_examples=4,
        train_conversations=27, train_answers=108, validation_conversations=1, validation_answers=4,
        train_tokens=900, trained_tokens=300, max_length=64,
    )  # fmt: skip
    reporter.report(planned)
    reporter.report(planned.model_copy(update={"validation_examples": 0}))
    await reporter.flush()
    told = claimed.app.run("SELECT message FROM training_events WHERE job_id = %s AND kind = 'planned'", (claimed.id,))
    assert {row["message"].partition(" held out,")[0] for row in told} == {
        "108 answers of 27 conversations to train on, 4 answers of 1 conversation",
        "108 answers of 27 conversations to train on, none",
    }


async def test_a_refused_write_raises_doubt_and_loses_nothing_of_the_story(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    claimed.app.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (claimed.id,))
    reporter.report(claimed.step(1))
    writing = asyncio.create_task(reporter.run())
    async with asyncio.timeout(10):
        while not claimed.refusals:
            await asyncio.sleep(0.02)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)
    assert claimed.app.job(claimed.id)["status"] == "cancelled"


async def test_while_the_database_is_away_everything_is_kept_and_written_when_it_is_back(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    writing = asyncio.create_task(reporter.run())
    try:
        for number in range(1, 4):
            reporter.report(claimed.step(number))
            claimed.app.run(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'test' AND datname = current_database()"
            )
            await asyncio.sleep(0.3)
        async with asyncio.timeout(20):
            while len(claimed.points()) < 3:
                await asyncio.sleep(0.05)
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    assert [point["step"] for point in claimed.points()] == [1, 2, 3]


@pytest.mark.parametrize(
    "sabotage",
    [
        "DROP TABLE metrics_points CASCADE",
        "ALTER TABLE metrics_points ADD COLUMN must_have integer NOT NULL",
        "REVOKE ALL ON metrics_points FROM training_daemon",
        "ALTER TABLE metrics_points ADD CONSTRAINT nothing_more CHECK (step < 0)",
    ],
)
async def test_a_table_of_points_that_refuses_everything_costs_the_curve_and_nothing_else(
    claimed: Claimed, sabotage: str
) -> None:
    claimed.app.run(sabotage)
    reporter = claimed.reporter()
    for number in (1, 2):
        reporter.report(claimed.step(number))
        await reporter.flush()
    reporter.report(events.Notice(job_id=str(claimed.id), code="resumed", message="…", data={"step": 1}))
    reporter.report(claimed.step(3))
    await reporter.flush()
    row = claimed.app.job(claimed.id)
    assert (row["status"], row["current_step"]) == ("running", 3)
    assert claimed.app.story(claimed.id).count("points_refused") == 1
    assert not claimed.refusals
    if "must_have" in sabotage:
        claimed.app.run("ALTER TABLE metrics_points DROP COLUMN must_have")
        reporter.report(claimed.step(4))
        await reporter.flush()
        assert [point["step"] for point in claimed.points()] == [4], "the curve goes on when the table is mended"


async def test_a_card_that_says_nothing_leaves_its_numbers_empty(claimed: Claimed) -> None:
    meter = CostMeter(price=None, num_gpus=1, already_spent=0.0)
    reporter = Reporter(
        claimed.store,
        claimed.job.lease,
        meter=meter,
        on_refused=lambda: None,
        read_load=lambda: read_load(Gpu(9_999, "gone", 80.0)),
    )
    reporter.report(claimed.step(1))
    await reporter.flush()
    metrics = claimed.app.job(claimed.id)["current_metrics"]
    assert metrics["gpu_utilization"] is None and metrics["gpu_temperature_celsius"] is None
    assert metrics["gpu_power_watts"] is None and claimed.points()[0]["gpu_utilization"] is None


async def test_progress_does_not_overtake_the_outbox(claimed: Claimed) -> None:
    """What the outbox tells (the claim, the start) is not told by progress too: a receiver drops what comes late."""
    told: list[object] = []
    meter = CostMeter(price=None, num_gpus=1, already_spent=0.0)
    reporter = Reporter(
        claimed.store,
        claimed.job.lease,
        meter=meter,
        on_refused=lambda: None,
        on_moved=lambda: told.append("moved"),
        on_written=lambda status: told.append(status["current_step"]),
    )
    reporter.enter(Stage.DOWNLOADING)
    await reporter.flush()
    reporter.enter(Stage.LOADING)
    await reporter.flush()
    assert told == [0]
    for step in (1, 2, 3):
        reporter.report(claimed.step(step))
        await reporter.flush()
    assert told == [0, "moved", 2, 3]


def steps_of(claimed: Claimed) -> list[int]:
    return [int(str(point["step"])) for point in claimed.points()]


def widest_gap(steps: list[int]) -> int:
    return max(later - earlier for earlier, later in pairwise(steps))


async def train(claimed: Claimed, reporter: Reporter, first: int, last: int, total: int) -> None:
    """Steps in batches, as a host writes them; the loss falls from 3 to 1 and jumps by one from step to step."""
    for number in range(first, last + 1):
        reporter.report(claimed.step(number, total=total, loss=3 - 2 * number / total + (-1) ** number / 2))
        if number % 97 == 0:
            await reporter.flush()
    await reporter.flush()


async def test_a_long_run_has_a_hundred_points_that_show_its_trend(claimed: Claimed) -> None:
    reporter = claimed.reporter(most_points=100)
    reporter.report(claimed.planned(total_steps=3000, total_epochs=3))
    for epoch in (1, 2, 3):
        await train(claimed, reporter, epoch * 1000 - 999, epoch * 1000, 3000)
        reporter.report(events.Evaluated(job_id=str(claimed.id), step=epoch * 1000, epoch=epoch, validation_loss=1.5))
    await reporter.flush()
    points = claimed.points()
    steps = steps_of(claimed)
    assert 80 <= len(steps) <= 100 and (steps[0], steps[-1]) == (1, 3000) and widest_gap(steps) <= 40
    assert [point["step"] for point in points if point["validation_loss"] is not None] == [1000, 2000, 3000]
    # A point is the mean of its steps: what jumps by one from step to step falls without a jump.
    losses = [float(str(point["training_loss"])) for point in points[1:]]
    assert all(later < earlier + 0.05 for earlier, later in pairwise(losses))


async def test_an_attempt_after_a_resume_keeps_to_a_hundred_points_however_many_it_finds(claimed: Claimed) -> None:
    # An earlier version has written every step.
    await train(claimed, claimed.reporter(), 1, 700, 1000)
    await claimed.claim_again()
    reporter = claimed.reporter(most_points=100)
    reporter.report(events.Notice(job_id=str(claimed.id), code="resumed", message="…", data={"step": 600}))
    await train(claimed, reporter, 601, 1000, 1000)
    steps = steps_of(claimed)
    assert len(steps) <= 100 and (steps[0], steps[-1]) == (1, 1000) and widest_gap(steps) <= 25


async def test_an_attempt_from_the_first_step_leaves_no_point_of_another_run(claimed: Claimed) -> None:
    await train(claimed, claimed.reporter(), 1, 60, 60)
    await claimed.claim_again()
    await train(claimed, claimed.reporter(most_points=100), 1, 3, 50)
    assert steps_of(claimed) == [1, 2, 3]


async def test_a_run_longer_than_planned_is_thinned_again_as_it_grows(claimed: Claimed) -> None:
    reporter = claimed.reporter(most_points=100)
    await train(claimed, reporter, 1, 2000, 90)
    reporter.end_curve()
    await reporter.flush()
    steps = steps_of(claimed)
    assert 40 <= len(steps) <= 100 and (steps[0], steps[-1]) == (1, 2000) and widest_gap(steps) <= 64


async def test_where_a_run_ends_early_its_last_step_is_a_point(claimed: Claimed) -> None:
    reporter = claimed.reporter(most_points=100)
    await train(claimed, reporter, 1, 555, 5000)
    assert steps_of(claimed)[-1] < 555
    reporter.end_curve()
    await reporter.flush()
    assert steps_of(claimed)[-1] == 555


async def test_the_row_and_the_story_say_what_the_job_is_trained_with(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    reporter.train_with({"base_model": "acme/tiny", "model_revision": "abc", "gpu_type": None})
    await reporter.flush()
    row = claimed.app.job(claimed.id)
    assert row["base_model"] == row["trained_with"]["base_model"] == "acme/tiny"
    reporter.report(claimed.planned())
    reporter.report(
        events.AdapterAttached(
            job_id=str(claimed.id), target_modules=("q_proj", "v_proj"), packing=True, trainable_parameters=4096
        )
    )
    reporter.report(claimed.step(1))
    await reporter.flush()
    row = claimed.app.job(claimed.id)
    first_step_at = row["trained_with"].pop("first_step_at")
    assert first_step_at and row["total_steps"] == 10
    assert row["trained_with"] == {
        "base_model": "acme/tiny", "model_revision": "abc", "gpu_type": None, "trainable_parameters": 4096,
        "hyperparameters": {"learning_rate": 2e-4, "packing": True, "target_modules": ["q_proj", "v_proj"]},
    }  # fmt: skip
    told = claimed.app.run("SELECT kind, message FROM training_events WHERE job_id = %s ORDER BY id", (claimed.id,))
    words = {line["kind"]: line["message"] for line in told}
    assert "learning rate 0.0002" in words["planned"]
    assert "q_proj, v_proj: 4,096 parameters learn" in words["adapter_attached"]
    # Whatever is written later, the first step stays when it was.
    reporter.train_with({"model_revision": "abc"})
    await reporter.flush()
    assert claimed.app.job(claimed.id)["trained_with"]["first_step_at"] == first_step_at


async def test_a_cancelled_job_that_still_knows_settings_to_write_tells_its_story_to_the_end(claimed: Claimed) -> None:
    reporter = claimed.reporter()
    claimed.app.run("UPDATE training_jobs SET status = 'cancelled' WHERE id = %s", (claimed.id,))
    reporter.report(claimed.planned())
    with pytest.raises(LeaseLost):
        await reporter.flush()
    await reporter.flush()
    assert "planned" in claimed.app.story(claimed.id)
