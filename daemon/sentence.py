"""Error messages, hints and event lines as a product can show them: sentences with a capital and a full stop.

In the code most of these texts are fragments, because one is often embedded in another ("the archive cannot be
unpacked: its manifest is missing"). They become sentences once, where they are written: into a row, onto a screen, into
an answer of the gateway.

A row's `error_message` says what happened and what to do, because an app's page may show that column alone. Its
`error_hint` repeats what to do. Who shows both uses `without_advice`, who shows one `with_advice`.
"""

from __future__ import annotations

import re

# A plain word. What looks like a setting, a path, a file or a command (`lora_rank`, `acme/tiny`, `data.jsonl`) stays as
# it is: it means something else with a capital.
_FIRST_WORD = re.compile(r"(?!brightrun-trainer\b)[a-z][a-z'’-]*(?=[\s,;]|$)")
_ENDED = re.compile(r"[.!?…][\"'”’`)\]]*$")


def as_sentence(text: str) -> str:
    """`text` with a capital and a full stop. A list of faults, one to a line, keeps its lines as they are."""
    text = text.strip()
    if _FIRST_WORD.match(text):
        text = text[0].upper() + text[1:]
    if not text or _is_list(text) or _ENDED.search(text):
        return text
    return text.rstrip(" ,;:") + "."


def with_advice(message: str, hint: str | None) -> str:
    """Returns what happened and what to do, as sentences. Advice that `message` ends with already is not repeated."""
    message, hint = as_sentence(message), as_sentence(hint or "")
    if not hint or message.endswith(hint):
        return message
    # A list of faults ends with its last line, not with the advice.
    between = "\n" if _is_list(message) else " "
    return f"{message}{between}{hint}".strip()


def without_advice(message: str, hint: str | None) -> str:
    """Returns what happened alone, of a row's `error_message` and `error_hint`."""
    return message.removesuffix(hint).rstrip() if hint and message != hint else message


def _is_list(text: str) -> bool:
    last_line = text.rsplit("\n", 1)[-1]
    return last_line != text and last_line.startswith(("-", " "))
