"""A comparison as plain values: who was compared, what each answered, and what each lost on which conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

BASE = 0
COMMON = "common"


@dataclass(frozen=True)
class Contestant:
    """The base model, which is always the first, or an adapter of it."""

    name: str
    job_id: UUID | None = None
    adapter_sha256: str | None = None
    about: str = ""


@dataclass(frozen=True)
class Answer:
    """`cut`: it had not ended after the most tokens allowed."""

    text: str
    tokens: int
    cut: bool


@dataclass
class Prompt:
    """One prompt and the answers to it, in the order of the contestants."""

    turns: list[dict[str, str]]
    reference: str | None
    answers: list[Answer | None]

    @property
    def question(self) -> str:
        return self.turns[-1]["content"]


@dataclass
class HeldOut:
    """Conversations that a loss was measured on. `name`: `common`, or a contestant's place, whose own set it is.

    Losses compare only within one set; sets of equal `digest` are the same. `unknown`: contestants of which nobody
    knows whether they were trained on it."""

    name: str
    conversations: int
    answers: int
    tokens: int
    digest: str
    unknown: list[int]
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def of(self) -> int | None:
        """Whose own set it is."""
        return None if self.name == COMMON else int(self.name)


@dataclass
class Comparison:
    base_model: str
    contestants: list[Contestant]
    # How it was asked and computed: max_tokens, temperature, seed, device, quantize.
    options: Mapping[str, Any]
    prompts_are_held_out: bool = False
    prompts: list[Prompt] = field(default_factory=list)
    sets: list[HeldOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # What a judge said, as `daemon.comparison.judge` tells it; empty without one.
    judged: list[dict[str, Any]] = field(default_factory=list)

    def take(self, said: Mapping[str, Any]) -> None:
        """Takes one line of the process that answers."""
        match said["kind"]:
            case "options":
                self.options = {**self.options, "quantize": bool(said["quantize"])}
            case "prompts":
                self.prompts_are_held_out = bool(said["held_out"])
                for prompt in said["prompts"]:
                    answers: list[Answer | None] = [None] * len(self.contestants)
                    self.prompts.append(Prompt(prompt["turns"], prompt["reference"], answers))
            case "sets":
                self.sets = [HeldOut(**held_out) for held_out in said["sets"]]
            case "answer":
                answer = Answer(said["text"], said["tokens"], said["cut"])
                self.prompts[said["prompt"]].answers[said["contestant"]] = answer
            case "loss":
                found = next(held_out for held_out in self.sets if held_out.name == said["set"])
                found.losses[said["contestant"]] = said["loss"]
            case "notice":
                self.notes.append(said["message"])

    @property
    def common(self) -> HeldOut | None:
        return next((held_out for held_out in self.sets if held_out.name == COMMON), None)

    def own_of(self, who: int) -> HeldOut | None:
        return next((held_out for held_out in self.sets if held_out.of == who), None)

    @property
    def is_one_set(self) -> bool:
        """Whether every loss is of the same conversations."""
        return len({held_out.digest for held_out in self.sets}) == 1

    def as_lines(self) -> list[dict[str, Any]]:
        """The comparison for programs: one object about all of it, then one for each prompt."""
        names = [contestant.name for contestant in self.contestants]
        sets = [
            {
                "set": COMMON if held_out.of is None else f"own of {names[held_out.of]}",
                "conversations": held_out.conversations,
                "answers": held_out.answers,
                "tokens": held_out.tokens,
                "digest": held_out.digest,
                "may_have_been_trained_on_by": [names[who] for who in held_out.unknown],
                "losses": {names[who]: loss for who, loss in held_out.losses.items()},
            }
            for held_out in self.sets
        ]
        head = {
            "kind": "comparison",
            "base_model": self.base_model,
            "contestants": [vars(contestant) for contestant in self.contestants],
            "prompts": len(self.prompts),
            "prompts_are_held_out": self.prompts_are_held_out,
            "options": dict(self.options),
            "held_out": sets,
            "notes": self.notes,
            "judged": self.judged,
        }
        return [head, *(self._line(number, prompt) for number, prompt in enumerate(self.prompts, start=1))]

    def _line(self, number: int, prompt: Prompt) -> dict[str, Any]:
        answers = [
            {"who": contestant.name, **(vars(answer) if answer is not None else {"text": None})}
            for contestant, answer in zip(self.contestants, prompt.answers, strict=True)
        ]
        turns, reference = prompt.turns, prompt.reference
        return {"kind": "prompt", "number": number, "turns": turns, "reference": reference, "answers": answers}
