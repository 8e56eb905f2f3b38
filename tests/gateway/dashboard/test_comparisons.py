"""Comparisons on the dashboard without a browser: what is told, and that a vote is blind, idempotent and one's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest

from daemon.comparison.record import Verdict
from tests.database_pool import DatabasePool
from tests.gateway.conftest import KEY, Gateway
from tests.gateway.dashboard.comparison_rows import record
from tests.gateway.watching import sign_in
from tests.lifecycle.queue import Queue
from tests.postgres import Server

OTHER_KEY = "another-key-of-this-test-0123456789"


class World:
    def __init__(self, queue: Queue, url: str) -> None:
        self.queue = queue
        self.url = url

    def record(self, *names: str, prompts: int = 3, **options: object) -> UUID:
        return record(self.queue.dsn, self.queue.user_id, names or ("quick",), prompts, **options)


@pytest.fixture(scope="module")
def world(postgres: Server, database_pool: DatabasePool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("comparisons")
    with database_pool.database() as name:
        queue = Queue(postgres.dsn(name), folder)
        keys = f"{KEY},{OTHER_KEY}"
        with Gateway(queue, folder, gateway_keys=keys, gateway_requests_per_second=1000) as gateway:
            yield World(queue, gateway.url)
        queue.close()


@pytest.fixture(scope="module")
def page(world: World) -> Iterator[httpx.Client]:
    with sign_in(world.url) as client:
        yield client


def ballot(client: httpx.Client, comparison: UUID, voter: str = "Anna", **pair: int) -> httpx.Response:
    asked = {"voter": voter, "one": 0, "two": 1} | pair
    return client.post(f"/dashboard/comparisons/{comparison}/ballot", json=asked)


def vote(client: httpx.Client, comparison: UUID, number: int, side: str, voter: str = "Anna") -> httpx.Response:
    cast = {"voter": voter, "one": 0, "two": 1, "number": number, "side": side}
    return client.post(f"/dashboard/comparisons/{comparison}/votes", json=cast)


def test_a_comparison_is_listed_and_told_with_answers_losses_and_names(world: World, page: httpx.Client) -> None:
    kept = world.record("slow", "quick")
    listed = page.get("/dashboard/comparisons").json()["comparisons"]
    mine = next(row for row in listed if row["id"] == str(kept))
    assert mine["prompts"] == 3 and mine["votes"] == 0
    told = page.get(f"/dashboard/comparisons/{kept}").json()
    assert [contestant["name"] for contestant in told["comparison"]["contestants"]] == ["base", "slow", "quick"]
    assert told["comparison"]["held_out"][0]["losses"] == {"base": 1.9, "slow": 1.65, "quick": 1.4}
    assert [answer["text"][:4] for answer in told["prompts"][0]["answers"]] == ["base", "slow", "quic"]
    assert told["tallies"] == [] and told["more"] is False
    told = page.get(f"/dashboard/comparisons/{kept}/names").json()
    assert set(told) == {"contestants"} and [who["name"] for who in told["contestants"]] == ["base", "slow", "quick"]
    for path in ("", "/names"):
        assert page.get(f"/dashboard/comparisons/{uuid4()}{path}").status_code == 404


def test_a_pair_is_shown_without_names_in_an_order_that_stays(world: World, page: httpx.Client) -> None:
    kept = world.record(prompts=40)
    shown = ballot(page, kept)
    pair = shown.json()["pair"]
    assert set(shown.json()) == {"prompts", "done", "pair"} and set(pair) == {"number", "turns", "left", "right"}
    assert set(pair["left"]) == set(pair["right"]) == {"text", "cut"}
    assert ballot(page, kept).json() == shown.json()
    orders: Counter[str] = Counter()
    told = shown.json()
    while "pair" in told:
        orders[told["pair"]["left"]["text"].split()[0]] += 1
        told = vote(page, kept, told["pair"]["number"], "tie").json()
    # The database draws: all forty on one side happen once in 2^39.
    assert set(orders) == {"base", "quick"}, orders
    assert told["mine"]["votes"] == {"one": 0, "two": 0, "tie": 40}


def test_a_vote_counts_for_whose_answer_it_is_and_the_same_again_changes_nothing(
    world: World, page: httpx.Client
) -> None:
    kept = world.record()
    told = ballot(page, kept).json()
    while "pair" in told:
        pair = told["pair"]
        side = "left" if pair["left"]["text"].startswith("quick") else "right"
        # A slip, corrected; and a request that the browser sends twice.
        if told["done"] < 2:
            vote(page, kept, pair["number"], "tie")
        vote(page, kept, pair["number"], side)
        told = vote(page, kept, pair["number"], side).json()
    assert told["done"] == 3 and told["choices"] == {"1": "two", "2": "two", "3": "two"}
    assert told["mine"]["votes"] == {"one": 0, "two": 3, "tie": 0}
    assert told["mine"]["words"] == (
        "quick is preferred on 3 of 3 decided prompts, 100 % (95 % interval 44 to 100 %). That may well be chance, "
        "which alone does this in 25 % of cases: ask more prompts."
    )
    # The names are told: what comes now is not blind, and changes nothing.
    assert vote(page, kept, 1, "tie").json()["choices"]["1"] == "two"
    assert page.get(f"/dashboard/comparisons/{kept}").json()["tallies"][0]["votes"]["two"] == 3


def test_voters_of_one_name_with_different_keys_are_two(world: World, page: httpx.Client) -> None:
    kept = world.record(prompts=1)
    with sign_in(world.url, OTHER_KEY) as other:
        assert vote(other, kept, 1, "left").status_code == 409  # it was not shown to this one
        ballot(page, kept)
        vote(page, kept, 1, "tie")
        told = ballot(other, kept).json()
        assert told["done"] == 0 and "pair" in told
        told = vote(other, kept, 1, "left").json()
        assert told["mine"]["votes"]["tie"] == 0
        assert told["all"][0]["voters"] == 2 and sum(told["all"][0]["votes"].values()) == 2
        # The same key without the page's session is the same voter.
        headers = {"Authorization": f"Bearer {OTHER_KEY}", "X-Dashboard": "1"}
        with httpx.Client(base_url=world.url, headers=headers, timeout=30) as by_key:
            assert ballot(by_key, kept).json()["choices"] == told["choices"]


def test_only_the_page_may_vote_and_wrong_words_are_refused(world: World, page: httpx.Client) -> None:
    kept = world.record()
    plain = {"voter": "Anna", "one": 0, "two": 1}
    for path, body in (("ballot", plain), ("votes", plain | {"number": 1, "side": "left"})):
        url = f"/dashboard/comparisons/{kept}/{path}"
        assert page.post(url, json=body, headers={"X-Dashboard": ""}).status_code == 403
        assert page.post(url, json=body, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert httpx.post(f"{world.url}{url}", json=body, headers={"X-Dashboard": "1"}).status_code == 401
    for wrong in ({"one": 1, "two": 1}, {"two": 2}, {"voter": ""}, {"voter": "x" * 61}, {"voter": "A\u202eb"}):
        assert ballot(page, kept, **wrong).status_code == 422, wrong  # type: ignore[arg-type]
    assert vote(page, kept, 1, "up").status_code == 422
    assert vote(page, kept, 99, "left").status_code == 409
    assert ballot(page, uuid4()).status_code == 404


def test_a_judges_verdicts_stand_apart_from_peoples_votes(world: World, page: httpx.Client) -> None:
    verdicts = tuple(Verdict(number, 0, 1, "gpt", "one", {"turned": "two"}) for number in (1, 2, 3))
    kept = world.record(verdicts=verdicts)
    ballot(page, kept)
    vote(page, kept, 1, "tie")
    people, judge = sorted(
        page.get(f"/dashboard/comparisons/{kept}").json()["tallies"], key=lambda tally: str(tally["kind"] != "person")
    )
    assert (people["votes"]["tie"], people["judge"]) == (1, None)
    assert (judge["votes"]["one"], judge["judge"]) == (3, "gpt")
    listed = page.get("/dashboard/comparisons").json()["comparisons"]
    assert next(row for row in listed if row["id"] == str(kept))["votes"] == 1


def test_a_user_sees_his_own_comparisons_and_no_pair_that_is_only_shown(world: World, page: httpx.Client) -> None:
    kept = world.record()
    ballot(page, kept)
    vote(page, kept, 1, "left")  # and the second is shown
    stranger = uuid4()
    world.queue.select("INSERT INTO auth.users (id, email) VALUES (%s, %s)", stranger, f"{stranger}@example.test")

    def seen(user: UUID) -> list[int]:
        with psycopg.connect(world.queue.dsn) as connection:
            connection.execute("SELECT set_config('role', 'authenticated', true)")
            connection.execute("SELECT set_config('request.jwt.claims', %s, true)", (f'{{"sub": "{user}"}}',))
            counts = []
            for table, key in (
                ("comparisons", "id"),
                ("comparison_answers", "comparison_id"),
                ("votes", "comparison_id"),
            ):
                statement = f"SELECT count(*) FROM training_{table} WHERE {key} = %s"
                row = connection.execute(statement.encode(), (kept,)).fetchone()
                assert row is not None
                counts.append(row[0])
            return counts

    assert seen(world.queue.user_id) == [1, 3, 1]
    assert seen(stranger) == [0, 0, 0]


def test_what_a_model_wrote_that_postgres_refuses_is_kept_with_a_sign(world: World, page: httpx.Client) -> None:
    kept = world.record(words="\x00\ud800 ", prompts=1)
    told = page.get(f"/dashboard/comparisons/{kept}").json()
    assert "\ufffd" in told["prompts"][0]["answers"][0]["text"]


def test_the_files_of_this_page_are_served(page: httpx.Client) -> None:
    for name in ("comparisons.js", "blind.js", "comparisons.css"):
        assert page.get(f"/dashboard/static/{name}").status_code == 200, Path(name)
