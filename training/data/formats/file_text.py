"""From bytes to text: a dataset is UTF-8; anything else is named for what it is."""

from __future__ import annotations

from pathlib import Path

from training.data.formats.faults import ONE_A_LINE, invalid
from training.events import ErrorCode
from training.failures import TrainingFailed

_AS_JSONL = "save it as UTF-8 JSONL, one conversation a line"
_UNPACK = "unpack it and submit the file inside, as UTF-8 JSONL"
_EXPORT = 'export its rows as JSONL: in pandas, df.to_json("data.jsonl", orient="records", lines=True)'
# In this order: UTF-32 begins with the two bytes of UTF-16.
_MAGIC: dict[bytes, tuple[str, str]] = {
    b"\xff\xfe\x00\x00": ("UTF-32 text", "save it as UTF-8"),
    b"\x00\x00\xfe\xff": ("UTF-32 text", "save it as UTF-8"),
    b"\xff\xfe": ("UTF-16 text", "save it as UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "save it as UTF-8"),
    b"\x1f\x8b": ("gzip-compressed", _UNPACK),
    b"PK\x03\x04": ("a zip or xlsx archive", _UNPACK),
    b"(\xb5/\xfd": ("compressed with zstd", _UNPACK),
    b"BZh": ("compressed with bzip2", _UNPACK),
    b"\xfd7zXZ": ("compressed with xz", _UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"PAR1": ("a parquet file", _EXPORT),
    b"ARROW1": ("an Arrow file", _EXPORT),
    b"ORC": ("an ORC file", _EXPORT),
    b"Obj\x01": ("an Avro file", _EXPORT),
    b"SQLite format 3": ("an SQLite database", _EXPORT),
    b"\x89HDF": ("an HDF5 file", _EXPORT),
    b"\x80\x04": ("a Python pickle", _EXPORT),
    b"\x80\x05": ("a Python pickle", _EXPORT),
    b"%PDF": ("a PDF", _AS_JSONL),
    b"\xd0\xcf\x11\xe0": ("an old Office document", _AS_JSONL),
    b"\x89PNG": ("an image", _AS_JSONL),
    b"\xff\xd8\xff": ("an image", _AS_JSONL),
}
# Texts that are no JSON: what an address answers that does not lead to the file itself.
_BEGINNINGS: dict[str, tuple[str, str]] = {
    "<!doctype html": ("an HTML page", "the address leads to a page, not to the file: check the dataset URL"),
    "<html": ("an HTML page", "the address leads to a page, not to the file: check the dataset URL"),
    "<": ("XML or HTML", "check that the dataset URL leads to the file itself, a JSON or JSONL file"),
    "version https://git-lfs": ("a pointer of Git LFS", "submit the file that it points to: `git lfs pull` fetches it"),
}


def read_text(path: Path) -> str:
    """Returns the file as text. Raises TrainingFailed: dataset_invalid, or dataset_unreachable if there is no file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise TrainingFailed(
            ErrorCode.DATASET_UNREACHABLE,
            f"the dataset file {path.name} does not exist",
            "check the dataset URL and submit again",
            transient=True,
        ) from None
    except IsADirectoryError:
        raise invalid(
            f"the dataset {path.name} is a folder, not a dataset file", "give one JSON or JSONL file"
        ) from None
    for magic, (what, hint) in _MAGIC.items():
        if raw.startswith(magic):
            raise invalid(f"the dataset is {what}, not JSON or JSONL", hint)
    if raw[257:262] == b"ustar":
        raise invalid("the dataset is a tar archive, not JSON or JSONL", _UNPACK)
    _refuse_wide_characters(raw)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise invalid(
            f"line {line} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})",
            "save the file as UTF-8 and submit again",
        ) from None
    if not text.strip():
        raise invalid("the dataset is empty", ONE_A_LINE)
    if "\x00" in text:
        line = text.count("\n", 0, text.index("\x00")) + 1
        raise invalid(f"line {line} contains a zero byte: this is not a text file", "save the file as UTF-8 JSONL")
    beginning = text.lstrip()[:40].lower()
    for begins, (what, hint) in _BEGINNINGS.items():
        if beginning.startswith(begins):
            raise invalid(f"the dataset is {what}, not JSON or JSONL", hint)
    return text


def _refuse_wide_characters(raw: bytes) -> None:
    """UTF-16 and UTF-32 without a byte order mark: JSON begins with an ASCII character, the rest of which is zeros."""
    first = raw[:4]
    if len(first) == 4 and first.count(0) >= 2 and first.strip(b"\x00"):
        what = "UTF-32" if first.count(0) == 3 else "UTF-16"
        raise invalid(f"the dataset is {what} text, not JSON or JSONL", "save it as UTF-8")
