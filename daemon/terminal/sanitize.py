"""Text from rows, files and servers as a terminal may be given it: no escape codes, no tricks with direction.

A dataset's name, a model's name and an error text are written by strangers. Everything of theirs that is
printed goes through here, and rich never reads markup in it (terminal.console turns markup off).
"""

from __future__ import annotations

import unicodedata

# Emoji of several parts are joined by it; every other invisible format character is dropped (bidi overrides first).
_JOINER = "\u200d"
_DELETE = 0x7F


def plain(value: object) -> str:
    """One line: line ends and tabs become spaces, control characters visible pictures (ESC is ␛)."""
    return " ".join("".join(_letter(letter) for letter in str(value)).split())


def plain_lines(value: object) -> str:
    """As plain, keeping line ends and indentation; a progress bar's carriage return keeps its last state only."""
    lines = str(value).replace("\r\n", "\n").expandtabs(4).split("\n")
    return "\n".join("".join(_letter(letter) for letter in line.rstrip("\r").rpartition("\r")[2]) for line in lines)


def _letter(letter: str) -> str:
    match unicodedata.category(letter):
        case "Cc":
            code = ord(letter)
            if letter in "\n\t\r\v\f":
                return " "
            return chr(0x2400 + code) if code < 0x20 else "␡" if code == _DELETE else "�"
        case "Cf":
            return letter if letter == _JOINER else ""
        case "Cs":
            return "�"
        case "Zl" | "Zp":
            return " "
        case _:
            return letter
