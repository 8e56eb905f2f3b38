"""The table of docs/reference/readers.md: `python -m tests.training.adapter.readers_page` writes it."""

from __future__ import annotations

import re

from tests.paths import ROOT

PAGE = ROOT / "docs" / "reference" / "readers.md"
_BORDERS = re.compile(r"(<!-- readers -->\n)(.*?)(<!-- /readers -->)", re.DOTALL)

FAMILIES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "phi3": "Phi-3, Phi-4",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "qwen3_next": "Qwen3-Next",
}
# The same adapter, as `export JOB --transformers4` writes it.
FOR_TRANSFORMERS_4 = "qwen3_next_for_transformers_4"
# With transformers 4.57. The versions where what is read changed, and that with which most servers were built.
OLD_PEFTS = ("0.12.0", "0.16.0", "0.17.0", "0.18.1")
YES, RAISES = "yes", "raises"


def cell(family: str, peft: str) -> str:
    """What test_reader_matrix.py sees of this version."""
    is_too_old = tuple(map(int, peft.split("."))) < (0, 17)
    return RAISES if family == "qwen3_next" and is_too_old else YES


def rows() -> list[str]:
    heads = ["base model", *(f"PEFT {peft}" for peft in OLD_PEFTS), "PEFT 0.21, transformers 5", "llama.cpp", "merged"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for family, name in FAMILIES.items():
        lines.append(f"| {' | '.join((name, *(cell(family, peft) for peft in OLD_PEFTS), YES, YES, YES))} |")
    rewritten = [cell(FOR_TRANSFORMERS_4, peft) for peft in OLD_PEFTS]
    lines.append(f"| {' | '.join(('Qwen3-Next, `--transformers4`', *rewritten, RAISES, YES, YES))} |")
    return lines


def written(page: str) -> str:
    return _BORDERS.sub(lambda match: f"{match[1]}{chr(10).join(rows())}\n{match[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
