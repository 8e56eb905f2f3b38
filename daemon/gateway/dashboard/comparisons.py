"""The dashboard's comparisons: their list, answers side by side, and blind votes of people.

A voter is shown two answers without names, in an order that the database draws once for each prompt and voter. His page
sends which side he prefers; who that was is known to the database alone, and told to him when he has voted on all.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

import structlog
from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StringConstraints

from daemon.comparison.tally import Vote, count_votes
from daemon.gateway.access.keys import KeyRing
from daemon.gateway.access.sessions import Sessions, cookie_value
from daemon.gateway.dashboard.own_page import SENT_BY_THE_PAGE
from daemon.gateway.dashboard.state import plain
from daemon.gateway.job_rows import GatewayRows, Refused

log = structlog.get_logger()

MOST_LISTED = 100
# Some megabytes of answers; more than anybody reads.
MOST_PROMPTS = 300
FRESH = {"Cache-Control": "no-store"}

ComparisonId = Annotated[UUID, Path()]
Place = Annotated[int, Field(ge=0, le=1000)]
# As it is shown to others: one line, nothing invisible.
VoterName = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        min_length=1,
        max_length=60,
        pattern=r"^[^\x00-\x1f\x7f-\x9f\u200e-\u202e\u2066-\u2069]+$",
    ),
]


class Ballot(BaseModel):
    """Which two contestants a voter is asked about."""

    voter: VoterName
    one: Place
    two: Place


class CastVote(Ballot):
    """`side` is what the voter saw on it, or `tie`."""

    number: Annotated[int, Field(ge=1, le=2**31 - 1)]
    side: Literal["left", "right", "tie"]


class Voters:
    """Tells the holders of one of the gateway's keys from those of another."""

    def __init__(self, ring: KeyRing, sessions: Sessions) -> None:
        self._ring = ring
        self._sessions = sessions

    def key_of(self, request: Request) -> str:
        """Returns a short mark of the caller's key, from which the key cannot be found."""
        place = self._ring.find(request.headers.get("authorization", ""))
        if place is None:
            place = self._sessions.find(cookie_value(request.headers.get("cookie", "")))
        assert place is not None, "the gate lets nobody in without a key or a session"
        return self._sessions.mark_of(place)


def add_comparisons(app: FastAPI, rows: GatewayRows, voters: Voters) -> None:
    """Adds the routes. They serve the dashboard's page only."""
    _add_reads(app, rows)
    _add_votes(app, rows, voters)


def _add_reads(app: FastAPI, rows: GatewayRows) -> None:
    @app.get("/dashboard/comparisons", include_in_schema=False)
    async def comparisons() -> Response:
        found = await rows.fetch("list_comparisons", {"limit": MOST_LISTED}, "reads")
        return JSONResponse(plain({"comparisons": found}), headers=FRESH)

    @app.get("/dashboard/comparisons/{comparison_id}/names", include_in_schema=False)
    async def names(comparison_id: ComparisonId) -> Response:
        """Answers who is compared, without a word of theirs: for a voter who chooses a pair."""
        found = await rows.fetch("read_comparison", {"comparison_id": comparison_id}, "reads")
        if not found:
            raise unknown_comparison()
        return JSONResponse(plain({"contestants": found[0]["contestants"]}), headers=FRESH)

    @app.get("/dashboard/comparisons/{comparison_id}", include_in_schema=False)
    async def comparison(comparison_id: ComparisonId) -> Response:
        """Answers a comparison with all names, answers, losses and counted votes."""
        found = await rows.fetch("read_comparison", {"comparison_id": comparison_id}, "reads")
        if not found:
            raise unknown_comparison()
        prompts = await rows.fetch(
            "read_comparison_answers", {"comparison_id": comparison_id, "limit": MOST_PROMPTS + 1}, "reads"
        )
        votes = await rows.fetch("read_votes", {"comparison_id": comparison_id}, "reads")
        whole = {
            "comparison": found[0],
            "prompts": prompts[:MOST_PROMPTS],
            "more": len(prompts) > MOST_PROMPTS,
            "tallies": _tallies(votes, [str(contestant["name"]) for contestant in found[0]["contestants"]]),
        }
        return JSONResponse(plain(whole), headers=FRESH)


def _add_votes(app: FastAPI, rows: GatewayRows, voters: Voters) -> None:
    @app.post("/dashboard/comparisons/{comparison_id}/ballot", include_in_schema=False, dependencies=SENT_BY_THE_PAGE)
    async def ballot(request: Request, comparison_id: ComparisonId, asked: Ballot) -> Response:
        """Answers with the next pair that this voter has not voted on, or with the result when there is none."""
        return await _next(rows, _parameters(comparison_id, asked, voters.key_of(request)))

    @app.post("/dashboard/comparisons/{comparison_id}/votes", include_in_schema=False, dependencies=SENT_BY_THE_PAGE)
    async def vote(request: Request, comparison_id: ComparisonId, cast: CastVote) -> Response:
        """Takes a vote and answers with the next pair. The same again changes nothing; after the names, none does."""
        parameters = _parameters(comparison_id, cast, voters.key_of(request))
        given = {"number": cast.number, "side": cast.side}
        standing = await _standing(rows, parameters)
        if standing["number"] is None:
            # A repeated last vote is answered with the result. Another one would come after the names.
            return await _next(rows, parameters)
        if not await rows.fetch("cast_vote", parameters | given):
            raise Refused(409, "This pair was not shown to you.", "Load the page again.")
        log.info("vote_cast", comparison_id=str(comparison_id), number=cast.number)
        return await _next(rows, parameters)


def unknown_comparison() -> Refused:
    return Refused(404, "There is no such comparison.", "`brightrun-trainer compare` makes one.")


def _parameters(comparison_id: UUID, asked: Ballot, voter_key: str) -> dict[str, Any]:
    if asked.one >= asked.two:
        raise Refused(422, "The two contestants must be different, the earlier one first.")
    return {"comparison_id": comparison_id, "voter": asked.voter, "voter_key": voter_key} | {
        "one": asked.one,
        "two": asked.two,
    }


async def _standing(rows: GatewayRows, parameters: dict[str, Any]) -> dict[str, Any]:
    found = await rows.fetch("read_ballot", parameters, "reads")
    if not found:
        raise unknown_comparison()
    if parameters["two"] >= found[0]["contestants"]:
        raise Refused(422, "This comparison has no such contestant.", "Load the page again.")
    return found[0]


async def _next(rows: GatewayRows, parameters: dict[str, Any]) -> Response:
    standing = await _standing(rows, parameters)
    if standing["number"] is not None and standing["turned"] is None:
        # The order is drawn in the database, and read from it: whoever drew first, it is the one that stands.
        await rows.fetch("show_ballot", parameters | {"number": standing["number"]})
        standing = await _standing(rows, parameters)
    progress = {"prompts": standing["prompts"], "done": standing["done"]}
    if standing["number"] is None:
        return JSONResponse(plain(progress | await _result(rows, parameters)), headers=FRESH)
    answers = [standing["answers"][parameters[who]] for who in ("one", "two")]
    left, right = reversed(answers) if standing["turned"] else answers
    shown = {
        "number": standing["number"],
        "turns": standing["turns"],
        "left": {"text": left["text"], "cut": left.get("cut")},
        "right": {"text": right["text"], "cut": right.get("cut")},
    }
    return JSONResponse(plain(progress | {"pair": shown}), headers=FRESH)


async def _result(rows: GatewayRows, parameters: dict[str, Any]) -> dict[str, Any]:
    """This voter's own votes and everybody's, with the names."""
    found = await rows.fetch("read_comparison", {"comparison_id": parameters["comparison_id"]}, "reads")
    votes = await rows.fetch("read_votes", {"comparison_id": parameters["comparison_id"]}, "reads")
    names = [str(contestant["name"]) for contestant in found[0]["contestants"]]
    pair = [vote for vote in votes if (vote["one"], vote["two"]) == (parameters["one"], parameters["two"])]
    mine = [
        vote
        for vote in pair
        if vote["kind"] == "person"
        and (vote["voter"], vote["voter_key"]) == (parameters["voter"], parameters["voter_key"])
    ]
    choices = {vote["number"]: vote["choice"] for vote in mine}
    return {"mine": _tallies(mine, names)[0], "all": _tallies(pair, names), "choices": choices}


def _tallies(votes: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Counts by pair; people together, each judge for itself."""
    groups: dict[tuple[int, int, str, str], list[dict[str, Any]]] = {}
    for vote in votes:
        judge = vote["voter"] if vote["kind"] == "judge" else ""
        groups.setdefault((vote["one"], vote["two"], vote["kind"], judge), []).append(vote)
    told = []
    for (one, two, kind, judge), of_group in sorted(groups.items()):
        tally = count_votes(Vote(vote["number"], vote["choice"]) for vote in of_group)
        told.append(
            {
                "one": one,
                "two": two,
                "kind": kind,
                "judge": judge or None,
                "voters": len({(vote["voter"], vote["voter_key"]) for vote in of_group}),
                "votes": tally.votes,
                "prompts": tally.prompts,
                "words": tally.in_words(names[one], names[two]),
            }
        )
    return told
