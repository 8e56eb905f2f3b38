"""Dataset files as the app writes them, with the quirks of its real files. For every test that reads a dataset.

A consultant talks with clients; each conversation has eight turns (four questions, four answers) unless told otherwise.
What was seen in the app's files, and is imitated here:

- **The history repeats the question.** The last entry of a pair's `conversation_history` is `current_user_input`, word
  for word, in every pair, the first one included.
- **Pairs contain each other.** The history of pair n holds the questions and the targets of pairs 1 to n-1.
- **A header.** The first line of a pairs file is `{"_meta": ...}`; a `brightrun-lora-v4` document begins with
  `training_file_metadata` and `consultant_profile`.
- **Nulls.** In every fifth conversation the last answer is not written yet: `target_response` is null. So are notes
  that nobody wrote.
- **Scaffolding.** A pair carries much that is not trained on: emotional_context, response_strategy, training_metadata
  with a quality_score, and more. So do the entries of its history.
- **Text as people write it.** Curly quotes, dashes, accents, emoji, other scripts, blank lines, U+2028.

The same seed gives the same file, to the byte. Two seeds share no question and no answer.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

AppFormat = Literal["messages", "pairs", "v4", "turns"]
FORMATS: tuple[AppFormat, ...] = ("messages", "pairs", "v4", "turns")

SYSTEM_PROMPT = (
    "You are Elena Morales, CFP®, of Pathways Financial Planning. Money is emotional: name the feeling first, "
    "normalise shame, and make one thing simple. Ask permission before you teach — then end with one small next step."
)

_PERSONAS = (
    ("overwhelmed_avoider", "Zoë Müller", "a nurse who has not opened a statement in months"),
    ("anxious_planner", "Marcus O’Brien", "an engineer with eleven spreadsheets"),
    ("pragmatic_optimist", "李美玲", "who sends money home to Táiběi every month"),
    ("grieving_inheritor", "José Peña", "whose father left him a house and a silence"),
)
_ARCS = (
    ("confusion_to_clarity", ("confusion", "shame", "curiosity", "relief")),
    ("fear_to_confidence", ("fear", "doubt", "hope", "confidence")),
    ("couple_conflict_to_alignment", ("anger", "guilt", "understanding", "calm")),
)
_TOPICS = ("a Roth conversion", "the emergency fund", "mum’s care home", "stock options (RSUs)", "the mortgage")
_STRATEGIES = ("normalize_then_clarify", "validate_then_educate", "slow_down_and_anchor")


@dataclass(frozen=True)
class AppConversation:
    """One conversation: its questions and answers in turn, and what the app knows about it. None: not answered yet."""

    id: str
    number: int
    seed: int
    exchanges: tuple[tuple[str, str | None], ...]

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(answer for _, answer in self.exchanges if answer is not None)

    def beginning(self, exchanges: int) -> AppConversation:
        """Returns the first exchanges as a conversation of its own, as an export in the middle of a talk leaves it."""
        return replace(self, id=f"{self.id}-beginning-{exchanges}", exchanges=self.exchanges[:exchanges])


def app_conversations(count: int, seed: int = 0, *, exchanges: int = 4) -> list[AppConversation]:
    """Returns conversations that differ in every question and every answer."""
    return [_converse(number, seed, exchanges) for number in range(count)]


def write_app_data(
    path: Path, format_: AppFormat, conversations: int | Sequence[AppConversation] = 8, *, seed: int = 0
) -> Path:
    """Writes one file as the app does. `conversations`: how many, or the ones to write."""
    chosen = app_conversations(conversations, seed) if isinstance(conversations, int) else conversations
    if format_ == "v4":
        path.write_text(json.dumps(v4_document(chosen), ensure_ascii=False, indent=2), encoding="utf-8")
    else:
        rows = {"messages": messages_rows, "pairs": pairs_rows, "turns": turns_rows}[format_](chosen)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# --- the four formats -------------------------------------------------------------------------------------------------


def messages_rows(conversations: Iterable[AppConversation]) -> list[dict[str, Any]]:
    """Returns one chat a row, the system prompt first."""
    system = {"role": "system", "content": SYSTEM_PROMPT}
    return [{"messages": [system, *_spoken(conversation)]} for conversation in conversations]


def turns_rows(conversations: Iterable[AppConversation]) -> list[dict[str, Any]]:
    """Returns one conversation a row, without a system prompt."""
    return [{"conversation_id": conversation.id, "turns": _spoken(conversation)} for conversation in conversations]


def pairs_rows(conversations: Sequence[AppConversation]) -> list[dict[str, Any]]:
    """Returns the header and one pair a row."""
    pairs = [pair for conversation in conversations for pair in app_pairs(conversation)]
    return [{"_meta": _file_metadata(conversations)}, *pairs]


def v4_document(conversations: Sequence[AppConversation]) -> dict[str, Any]:
    """Returns the whole document of a file `brightrun-lora-v4`."""
    return {
        "training_file_metadata": _file_metadata(conversations),
        "consultant_profile": {
            "name": "Elena Morales, CFP®",
            "business": "Pathways Financial Planning",
            "expertise": "fee-only financial planning for mid-career professionals",
            "years_experience": 15,
            "core_philosophy": {"principle_1": "money is emotional", "principle_2": "judgement-free space"},
            "communication_style": {"tone": "warm, professional", "avoid": ["jargon", "“should”"]},
        },
        "conversations": [
            {"conversation_metadata": _about(conversation), "training_pairs": app_pairs(conversation)}
            for conversation in conversations
        ],
    }


def app_pairs(conversation: AppConversation) -> list[dict[str, Any]]:
    """Returns the pairs of one conversation, in the order of its turns."""
    chosen = _dice(conversation.seed, conversation.number, "pairs")
    persona, (arc, feelings) = _who_and_arc(conversation)
    pairs = []
    history: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(conversation.exchanges, start=1):
        feeling = feelings[(number - 1) % len(feelings)]
        history.append(
            {
                "turn": len(history) + 1,
                "role": "user",
                "content": question,
                "emotional_state": {"primary": feeling, "intensity": round(chosen.uniform(0.3, 0.9), 2)},
            }
        )
        pairs.append(
            {
                "id": f"{conversation.id}_turn{number}",
                "conversation_id": conversation.id,
                "turn_number": number,
                "conversation_metadata": {
                    "client_persona": persona[1],
                    "client_background": persona[2],
                    "session_context": "first session, by chat — late in the evening",
                    "conversation_phase": "opening" if number == 1 else "working",
                    "expected_outcome": None,
                },
                "system_prompt": SYSTEM_PROMPT,
                "conversation_history": [dict(entry) for entry in history],
                "current_user_input": question,
                "emotional_context": {
                    "detected_emotions": {
                        "primary": feeling,
                        "primary_confidence": round(chosen.uniform(0.6, 0.95), 2),
                        "secondary": None,
                        "valence": "mixed",
                    },
                    "emotional_indicators": {"explicit": [feeling], "implicit": [], "punctuation": ["…", "?!"]},
                    "red_flags": [],
                },
                "response_strategy": {
                    "primary_strategy": chosen.choice(_STRATEGIES),
                    "primary_rationale": f"the client names {feeling}; information comes after it",
                    "secondary_strategies": ["one_small_step"],
                    "tone_selection": "warm_professional",
                },
                "target_response": answer,
                "response_breakdown": None if answer is None else {"total_sentences": answer.count(".")},
                "training_metadata": {
                    "difficulty_level": "intermediate",
                    "emotional_progression_target": f"{arc} ({number} of {len(conversation.exchanges)})",
                    "quality_score": chosen.choice([3, 3.5, 4, 5]),
                    "quality_criteria": {"empathy_score": 4, "clarity_score": 4, "brand_voice_alignment": 5},
                    "human_reviewed": False,
                    "reviewer_notes": None,
                },
            }
        )
        if answer is not None:
            history.append({"turn": len(history) + 1, "role": "assistant", "content": answer, "emotional_state": None})
    return pairs


# --- what is said -----------------------------------------------------------------------------------------------------


def _converse(number: int, seed: int, exchanges: int) -> AppConversation:
    chosen = _dice(seed, number, "words")
    (_, who, _), (_, feelings) = _PERSONAS[number % len(_PERSONAS)], _ARCS[number % len(_ARCS)]
    spoken: list[tuple[str, str | None]] = []
    for exchange in range(exchanges):
        topic, feeling = chosen.choice(_TOPICS), feelings[exchange % len(feelings)]
        # The sum names conversation and exchange, so that no two questions and no two answers are equal.
        amount = f"${seed + 1},{number + 100:03d}.{exchange:02d}"
        question = chosen.choice(
            (
                f"It’s {who} again… I keep staring at {topic}, all {amount} of it. I feel {feeling}. Silly?",
                f"Okay. So — {amount} for {topic}?! My wife says “just do it”, but {feeling} is all I hear.",
                f"About {topic}:\n\n- {amount} saved\n- nobody to ask 😔\n\nWhere would *you* begin?",
            )
        )
        answer = chosen.choice(
            (
                f"First: {feeling} around {topic} isn’t silly at all. With {amount} you have more room than it seems. "
                "Would it help if we looked at one piece of it together?",
                f"Thank you for telling me. “{feeling.capitalize()}” is what most people say about {topic} 💛\n\n"
                f"Let’s leave {amount} where it is this week, and decide on Sunday — naïve as that sounds.",
                f"I hear {feeling} — and under it, care.\u2028{amount} is a start, 没关系. Shall I explain {topic}?",
            )
        )
        spoken.append((question, answer))
    if number % 5 == 3 and exchanges > 1:
        spoken[-1] = (spoken[-1][0], None)
    name = uuid.UUID(int=chosen.getrandbits(128), version=4)
    return AppConversation(str(name), number, seed, tuple(spoken))


def _spoken(conversation: AppConversation) -> list[dict[str, str]]:
    messages = []
    for question, answer in conversation.exchanges:
        messages.append({"role": "user", "content": question})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def _about(conversation: AppConversation) -> dict[str, Any]:
    persona, (arc, _) = _who_and_arc(conversation)
    return {
        "conversation_id": conversation.id,
        "source_file": f"fp_conversation_{conversation.number:03d}.json",
        "created_date": "2025-11-04",
        "total_turns": sum(1 if answer is None else 2 for _, answer in conversation.exchanges),
        "quality_tier": "experimental",
        "scaffolding": {
            "persona_archetype": persona[0],
            "emotional_arc_key": arc,
            "training_topic": None,
        },
    }


def _file_metadata(conversations: Sequence[AppConversation]) -> dict[str, Any]:
    return {
        "file_name": "elena-morales-financial-confidence",
        "version": "4.0.0",
        "format_spec": "brightrun-lora-v4",
        "created_date": "2025-11-04T09:12:55.123Z",
        "target_model": None,
        "vertical": "financial_planning_consultant",
        "total_conversations": len(conversations),
        "total_training_pairs": sum(len(conversation.answers) for conversation in conversations),
        "total_validation_pairs": 0,
        "quality_summary": {"avg_quality_score": 3.9, "human_reviewed_count": 0},
        "scaffolding_distribution": {"personas": {"anxious_planner": len(conversations)}, "emotional_arcs": {}},
    }


def _who_and_arc(conversation: AppConversation) -> tuple[tuple[str, str, str], tuple[str, tuple[str, ...]]]:
    return _PERSONAS[conversation.number % len(_PERSONAS)], _ARCS[conversation.number % len(_ARCS)]


def _dice(seed: int, number: int, what: str) -> random.Random:
    return random.Random(f"{seed} {number} {what}")
