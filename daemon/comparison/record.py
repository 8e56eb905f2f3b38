"""A comparison as the database keeps it: the parameters of one statement."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from daemon.comparison.results import Comparison
from daemon.comparison.tally import Choice
from daemon.database.column_types import clean_json


@dataclass(frozen=True)
class Verdict:
    """What a judge prefers between the answers of two contestants to one prompt, and its words in both orders."""

    number: int
    one: int
    two: int
    voter: str
    choice: Choice
    said: dict[str, Any]


def parameters(comparison: Comparison, user_id: UUID, verdicts: Iterable[Verdict] = ()) -> dict[str, Any]:
    """Returns the parameters of `record_comparison`. What Postgres refuses in texts is replaced."""
    head, *prompts = comparison.as_lines()
    answers = [
        {
            "number": prompt["number"],
            "turns": prompt["turns"],
            "reference": prompt["reference"],
            "answers": [
                {name: value for name, value in answer.items() if name != "who"} for answer in prompt["answers"]
            ],
        }
        for prompt in prompts
    ]
    return {
        "user_id": user_id,
        "base_model": comparison.base_model,
        "prompts_are_held_out": comparison.prompts_are_held_out,
        **{name: _json(head[name]) for name in ("contestants", "options", "held_out", "notes")},
        "prompts": _json(answers),
        "verdicts": _json([asdict(verdict) for verdict in verdicts]),
    }


def _json(value: Any) -> Jsonb:
    return Jsonb(clean_json(json.loads(json.dumps(value, default=str))))
