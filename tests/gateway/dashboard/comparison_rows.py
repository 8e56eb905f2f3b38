"""A comparison as `compare` records it, written by its own statement."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import psycopg

from daemon.comparison.record import Verdict, parameters
from daemon.comparison.results import Answer, Comparison, Contestant, HeldOut, Prompt
from daemon.database.statements import statement

OPTIONS = {"max_tokens": 60, "temperature": 0.0, "seed": 0, "device": "cpu", "quantize": False}


def comparison(names: tuple[str, ...], prompts: int, *, words: str = "", jobs: tuple[UUID, ...] = ()) -> Comparison:
    """Each answer names its contestant, so that a test can tell whose it is."""
    contestants = [Contestant("base")]
    for place, name in enumerate(names):
        contestants.append(Contestant(name, jobs[place] if place < len(jobs) else None, "0" * 64, "rank 16, epochs 3"))
    held = HeldOut("common", 8, 20, 4_321, "0a1b2c3d4e5f", [], {who: 1.9 - who / 4 for who in range(len(contestants))})
    asked = [
        Prompt(
            [{"role": "user", "content": f"{words}Question {number}: what should I do on a rainy Sunday?"}],
            f"{words}Read a book, and then another.",
            [
                Answer(f"{words}{contestant.name} answers question {number}. " * (1 + who), 20, cut=who == 0)
                for who, contestant in enumerate(contestants)
            ],
        )
        for number in range(1, prompts + 1)
    ]
    return Comparison("acme/tiny", contestants, OPTIONS, True, asked, [held], [f"{words}A note."] if words else [])


def record(
    dsn: str,
    user_id: UUID,
    names: tuple[str, ...] = ("quick",),
    prompts: int = 3,
    *,
    verdicts: tuple[Verdict, ...] = (),
    **options: Any,
) -> UUID:
    with psycopg.connect(dsn, autocommit=True) as connection:
        # With no more rights than a host's login has.
        connection.execute("SET ROLE training_daemon")
        given = parameters(comparison(names, prompts, **options), user_id, verdicts)
        row = connection.execute(statement("record_comparison").encode(), given).fetchone()
    assert row is not None
    kept: UUID = row[0]
    return kept
