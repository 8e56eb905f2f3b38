"""What a user should know of what the model's chat template makes of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from training.data.chat_template import ChatTemplate, Encoded
from training.data.formats.conversation import Conversation
from training.data.remarks import Remark


def remarks_on_encoding(
    template: ChatTemplate, conversations: Sequence[Conversation], encoded: Sequence[Encoded]
) -> list[Remark]:
    """Says what was made of the conversations beyond what is written in them."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for conversation, row in zip(conversations, encoded, strict=True):
        counts.update(+row.notes)
        for note in +row.notes:
            first.setdefault(note, conversation.place)
    examples = sum(len(row.examples) for row in encoded if row.notes["split_by_answer"])
    notes = _notes(counts, first, examples, template.turn_end.marks)
    return [*_on_template(template, conversations), *(note for note in notes if counts[note.code])]


def _notes(count: Mapping[str, int], first: Mapping[str, str], examples: int, marks: Sequence[str]) -> list[Remark]:
    """Returns one remark for each code that ChatTemplate.encode counts under."""

    def how_many(code: str, what: str) -> str:
        return f"{count[code]:,} {what} (the first: {first.get(code)})"

    remarks = [
        Remark(
            "turns_merged",
            f"in {how_many('turns_merged', 'conversations')} adjacent turns of one role were joined with a blank line, "
            "because this model's chat template refuses them",
        ),
        Remark(
            "end_marks_removed",
            f"{how_many('end_marks_removed', 'answers')} ended with a mark such as {marks[0] if marks else ''}; it was "
            "removed, because the chat template writes its own",
        ),
        Remark(
            "control_tokens",
            f"{how_many('control_tokens', 'messages')} contain control tokens of this model as text; they become "
            "control tokens, as they do on a server: remove them from the data if that is not meant",
        ),
        Remark(
            "split_by_answer",
            f"{how_many('split_by_answer', 'conversations')} became {examples:,} examples, one for each answer: this "
            "model's chat template shows an answer differently once another turn follows it",
        ),
        Remark(
            "opening_not_trained",
            f"{how_many('opening_not_trained', 'conversations')} open with an answer that is shown but not trained on: "
            "with this model's chat template nothing could ask for it",
        ),
        Remark(
            "empty_thought_added",
            f"{how_many('empty_thought_added', 'answers')} have no thought; they are trained with an empty one, as "
            "this model's chat template shows or begins one before each answer",
        ),
    ]
    return [replace(remark, data={"count": count[remark.code], "first": first.get(remark.code)}) for remark in remarks]


def _on_thinking(template: ChatTemplate) -> list[Remark]:
    thinking = template.thinking
    if thinking.options:
        options = ", ".join(f"{name}={value}" for name, value in thinking.options.items())
        return [
            Remark(
                "template_options",
                f"this model's chat template is given {options}, because "
                f"{'answers have thoughts' if any(thinking.options.values()) else 'no answer has a thought'}; a server "
                "must give it the same, and the README.md beside the adapter has the commands",
                {"options": dict(thinking.options)},
            )
        ]
    if thinking.answers_at_once:
        return [
            Remark(
                "answers_at_once",
                "this model's chat template shows the last answer after an empty thought, which no prompt contains; it "
                "is left out, so the adapter answers at once",
            )
        ]
    return []


def _on_template(template: ChatTemplate, conversations: Sequence[Conversation]) -> list[Remark]:
    remarks = _on_thinking(template)
    if template.is_default:
        remarks.append(
            Remark("default_template", "this model has no chat template; the default one is used and saved beside it")
        )
    with_system = [c for c in conversations if any(turn.role == "system" for turn in c.turns)]
    empty = [c for c in with_system if not any(turn.role == "system" and turn.content.strip() for turn in c.turns)]
    if template.folds_system and len(with_system) > len(empty):
        remarks.append(
            Remark(
                "system_folded",
                "this model's chat template has no system role; system texts are put before the first user message",
            )
        )
    default = template.default_system_text
    if default and len(with_system) < len(conversations):
        without = len(conversations) - len(with_system)
        remarks.append(
            Remark(
                "default_system_text",
                f"{without} conversations have no system message; this model's chat template adds its own to them, "
                f"as it does on a server: {default[:200]!r}",
                {"count": without},
            )
        )
    if empty and not template.folds_system:
        remarks.append(
            Remark(
                "empty_system_message",
                f"{len(empty)} conversations (the first: {empty[0].place}) have an empty system message; it is kept as "
                "it is" + (", so the chat template does not add its own system text" if default else ""),
                {"count": len(empty), "first": empty[0].place},
            )
        )
    if not template.turn_end.is_written:
        stop = template.stop_text
        remarks.append(
            Remark(
                "end_added",
                f"this model's chat template does not end an answer with a token that stops a server; {stop} is "
                "trained after each answer",
                {"token": stop},
            )
        )
    return remarks
