"""Every text that the code makes for a row, an answer or a screen reads as a sentence, in the field's own words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

from daemon.sentence import as_sentence
from tests.paths import ROOT
from training.events import ErrorCode

# What takes such a text, and which of its arguments are texts: all strings but names and codes.
MAKERS = {
    *("JobFailed", "JobDelayed", "HostFault", "TrainingFailed", "Failed", "RunFailed", "Diagnosis"),
    *("Released", "Remark"),
    *("HostUnfit", "DatabaseAway", "DatabaseUnprepared", "RowsHidden", "LeaseLost", "ArchiveInvalid"),
    *("AddressRefused", "AddressUnknown", "CheckpointUnusable", "CopyUnusable", "UploadInterrupted", "UploadGone"),
    *("DatabaseUrlInvalid", "RunPodError", "ImportFailed"),
    *("CommandFailed", "Misused", "DemoFailed", "Refused", "Problem", "red", "yellow"),
    *("notice", "tell", "begin", "invalid", "_unreachable", "_not_downloaded", "_forbidden", "_TransferBroken"),
}
VALUE = "§"
# Words of this house that a user of the service does not know, or that mean something else to him.
STRANGE = re.compile(
    r"\b(cards?|wish(es)?|in other hands|without a word|story|places?|told|nobody|somebody|whoever|begun again|anew)\b"
)


def texts() -> Iterator[tuple[str, str]]:
    """Where it stands, and the text with § for each value. Names, codes and keys have no blank in them."""
    for place, call in calls(MAKERS):
        for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
            text = _text(argument)
            if text is not None and len(text.split()) > 2:
                yield place, text


def calls(names: set[str]) -> Iterator[tuple[str, ast.Call]]:
    """Every call of one of these, and where it stands."""
    for package in ("daemon", "training"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _name(node.func) in names:
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", node


def _name(called: ast.expr) -> str:
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _text(node: ast.expr) -> str | None:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in parts)
        case _:
            return None


@cache
def all_texts() -> list[tuple[str, str]]:
    return list(texts())


def test_the_texts_of_every_package_are_found() -> None:
    assert len(all_texts()) > 200
    assert {place.split("/")[0] for place, _ in all_texts()} == {"daemon", "training"}


def test_every_text_becomes_a_sentence() -> None:
    assert [(place, text) for place, text in all_texts() if not reads_as_a_sentence(as_sentence(text))] == []


def test_no_text_uses_words_that_only_this_house_understands() -> None:
    assert [(place, text) for place, text in all_texts() if STRANGE.search(text)] == []


def reads_as_a_sentence(text: str) -> bool:
    # A value, a setting, a command, a quotation or a list may begin it; a plain word has a capital.
    begins = text[0].isupper() or text[0] in f"{VALUE}`'\"-" or re.match(r"[\w-]*[_\d/.]", text)
    return bool(begins and re.search(rf"[.!?…{VALUE}][\"'”’`)\]]*$", text) and not re.search(r"\w\.\.$", text))


def test_an_error_that_names_its_code_says_what_to_do_next() -> None:
    silent = []
    for place, call in calls({"JobFailed", "JobDelayed", "TrainingFailed", "Failed", "RunFailed", "Diagnosis"}):
        names_code = ast.unparse(call.args[0] if call.args else call).startswith("ErrorCode.")
        if names_code and len(call.args) < 3 and all(keyword.arg != "hint" for keyword in call.keywords):
            silent.append(place)
    assert silent == []


def test_the_guide_to_error_codes_says_of_each_what_happened_and_what_to_do() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    table = page[page.index("<!-- error codes -->") : page.index("<!-- /error codes -->")]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert {row[0].strip("`") for row in rows} == set(ErrorCode)
    assert all(len(row) == 3 and all(row) for row in rows)
    assert not STRANGE.search(table)
