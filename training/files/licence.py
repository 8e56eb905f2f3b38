"""Reads under which licence a base model was published, from what lies in its folder. Nothing is guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# The keys of a model card on the hub that state a licence, each on a line of its own.
_STATED = re.compile(r"^(license(?:_name|_link)?):[ \t]*(\S[^\r\n]*?)[ \t]*$", re.MULTILINE)
_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
# The first words of a licence that is always the same text, with its name on the hub.
_KNOWN_BEGINNINGS = {
    "Apache License Version 2.0, January 2004": "apache-2.0",
    "MIT License": "mit",
    "The MIT License (MIT)": "mit",
}
_READ_CHARACTERS = 20_000
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Licence:
    """`license`: the hub's name for it, `other` if it has none; `name` and `link` as the model's card gives them.

    `source`: the file of the base model's folder that states it."""

    license: str
    source: str
    name: str | None = None
    link: str | None = None


def licence_of(folder: Path) -> Licence | None:
    """Returns what the folder's README states in its front matter, or else its LICENSE file; None if neither is there.

    Of a LICENSE file that has no name of its own on the hub, its first line is the name."""
    stated = _front_matter(_beginning(folder / "README.md"))
    if "license" in stated:
        return Licence(stated["license"], "README.md", stated.get("license_name"), stated.get("license_link"))
    for file in _FILES:
        words = _beginning(folder / file).split()
        if not words:
            continue
        text = " ".join(words)
        for beginning, name in _KNOWN_BEGINNINGS.items():
            if text.startswith(beginning):
                return Licence(name, file)
        first = next(line for line in _beginning(folder / file).splitlines() if line.strip())
        return Licence("other", file, first.strip(" #*\t")[:_SHOWN_CHARACTERS] or None)
    return None


def _front_matter(text: str) -> Mapping[str, str]:
    found = _FRONT_MATTER.match(text)
    stated: dict[str, str] = {}
    for key, value in _STATED.findall(found.group(1) if found else ""):
        plain = value.split(" #")[0].strip().strip("\"'")
        if plain and plain[0] not in "[{&*!|>%@`":
            stated[key] = plain[:_SHOWN_CHARACTERS] if key != "license_link" else plain[:300]
    return stated


def _beginning(file: Path) -> str:
    try:
        with file.open(encoding="utf-8", errors="replace") as text:
            return text.read(_READ_CHARACTERS)
    except OSError:
        return ""
