"""Makes text from rows, files and servers safe for a terminal: no escape codes, no changes of text direction.

Strangers write the names of datasets and models and error texts. All such text goes through here before
it is printed, and rich never reads markup in it (terminal.console turns markup off).
"""

from __future__ import annotations

import unicodedata

# It joins the parts of an emoji. Every other invisible format character is dropped (above all bidi overrides).
_JOINER = "\u200d"
_DELETE = 0x7F


def plain(value: object) -> str:
    """One line: line ends and tabs become spaces, control characters become visible symbols (ESC is ␛)."""
    return " ".join("".join(_letter(letter) for letter in str(value)).split())


def plain_lines(value: object) -> str:
    """Like `plain`, but keeps line ends and indentation. After a carriage return only the last state is kept."""
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
