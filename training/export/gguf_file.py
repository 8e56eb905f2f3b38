"""Writes one GGUF file tensor by tensor: first what is in it, then the data in pieces, so that memory stays bounded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.events import ErrorCode
from training.export.orders import OnBytes
from training.failures import TrainingFailed
from training.files.durable_files import beside, put_in_place

Array = np.ndarray[Any, Any]

# For the words of the vocabulary, and what a file system needs itself.
_SPARE_BYTES = 2**26
TYPES = ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. `pieces` yields its bits in order, each a run of rows, already in `type`."""

    name: str
    shape: tuple[int, ...]
    # A member's name of gguf.GGMLQuantizationType: F32, F16, BF16, Q8_0.
    type: str
    pieces: Callable[[], Iterator[Array]]


def need_gguf() -> Any:
    """Returns the package `gguf`. Raises TrainingFailed if this host does not have it."""
    try:
        import gguf
    except ImportError as error:
        raise TrainingFailed(
            ErrorCode.INVALID_SPEC,
            "the package gguf, which writes GGUF files, is not installed on this host",
            'install it: pip install "brightrun-trainer[gguf]"',
        ) from error
    return gguf


def write_gguf(
    out: Path, architecture: str, describe: Callable[[Any], None], entries: list[Entry], done: OnBytes
) -> int:
    """Writes `out`, complete or not at all, and returns its size. `describe` adds the metadata to a GGUFWriter."""
    gguf = need_gguf()
    writer = gguf.GGUFWriter(None, architecture)
    describe(writer)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), nbytes(entry), raw_dtype=kind)
    total, written = sum(nbytes(entry) for entry in entries), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    _refuse_small_disk(out.parent, total)
    with beside(out) as staging:
        writer.write_header_to_file(staging)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for entry in entries:
            begin = file.tell()
            for piece in entry.pieces():
                np.ascontiguousarray(piece).tofile(file)
                written += piece.nbytes
                done(written, total)
            if file.tell() - begin != nbytes(entry):
                raise AssertionError(f"{entry.name}: {file.tell() - begin} bytes instead of {nbytes(entry)}")
            writer.write_padding(file, nbytes(entry))
        file.flush()
        os.fsync(file.fileno())
        writer.close()
        put_in_place(staging, out)
    return out.stat().st_size


def _refuse_small_disk(folder: Path, needed: int) -> None:
    """Before hours of writing, not after."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise TrainingFailed(
            ErrorCode.DISK_FULL,
            f"the GGUF file takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free there",
            "free space, or name a file on a larger disk",
        )


def nbytes(entry: Entry) -> int:
    gguf = need_gguf()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.type]]
    return int(np.prod(entry.shape, dtype=np.int64)) // int(block) * int(size)


def fitting_type(shape: tuple[int, ...], wanted: str) -> str:
    """q8_0 stores 32 values of a row together; a row of another length goes to f16, as llama.cpp's converter does."""
    return "F16" if wanted == "Q8_0" and shape[-1] % 32 else wanted


def in_type(values: Array, kind: str) -> Array:
    """Returns float32 values in another type of GGUF, as bits."""
    gguf = need_gguf()
    found: Array = gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), gguf.GGMLQuantizationType[kind])
    return found
