"""From bytes to text: a dataset is UTF-8; anything else is named for what it is."""

from __future__ import annotations

from pathlib import Path

from training.data.formats.faults import ONE_A_LINE, invalid
from training.events import ErrorCode
from training.failures import TrainingFailed

_MAGIC = {
    b"\x1f\x8b": "gzip-compressed",
    b"PK\x03\x04": "a zip or xlsx archive",
    b"PAR1": "a parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"%PDF": "a PDF",
}


def read_text(path: Path) -> str:
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
    for magic, what in _MAGIC.items():
        if raw.startswith(magic):
            raise invalid(
                f"the dataset is {what}, not JSON or JSONL", "save it as UTF-8 JSONL, one conversation a line"
            )
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
    return text
