"""Error messages, hints and event lines as a product can show them: sentences with a capital and a full stop.

In the code most of these texts are fragments, because one is often embedded in another ("the archive cannot be
unpacked: its manifest is missing"). They become sentences once, where they are written: into a row, onto a screen, into
an answer of the gateway.
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
    last_line = text.rsplit("\n", 1)[-1]
    is_list = last_line is not text and last_line.startswith(("-", " "))
    if not text or is_list or _ENDED.search(text):
        return text
    return text.rstrip(" ,;:") + "."
