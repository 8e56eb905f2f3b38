"""Weights are in the page cache before they are needed: checked with the kernel, page by page."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from tests.training.conftest import ModelOf, SpecOf
from training.files.page_cache import read_ahead, weights_of

_PAGE = os.sysconf("SC_PAGE_SIZE")


def _resident_share(path: Path) -> float:
    size = path.stat().st_size
    pages = -(-size // _PAGE)
    told = (ctypes.c_ubyte * pages)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(start), ctypes.c_size_t(size), told)
        del start
    assert failed == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in told) / pages


def _large_file(path: Path) -> Path:
    """Written through to disk, and dropped from the page cache if the file system can do that."""
    with path.open("wb") as file:
        for number in range(32):
            file.write(bytes([number]) * 2**20)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_what_will_be_loaded_is_read_before(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of(model_path=tmp_path)
    shards = [_large_file(tmp_path / f"model-{number}.safetensors") for number in range(2)]
    thread = read_ahead(spec)
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert all(_resident_share(shard) > 0.99 for shard in shards)


def test_a_copy_in_4_bits_is_read_before_the_model_itself(spec_of: SpecOf, tiny: ModelOf, tmp_path: Path) -> None:
    spec = spec_of(quantized_dir=tmp_path / "copies")
    own = sorted(tiny("qwen3").glob("*.safetensors"))
    assert own and weights_of(spec) == own
    for age, name in enumerate(("new", "old")):
        copy = tmp_path / "copies" / f"tiny--qwen3-nf4-{name}"
        copy.mkdir(parents=True)
        (copy / "weights-00000.safetensors").touch()
        os.utime(copy, (1e9 - age, 1e9 - age))
    assert weights_of(spec) == [tmp_path / "copies" / "tiny--qwen3-nf4-new" / "weights-00000.safetensors"]
    assert weights_of(spec.model_copy(update={"quantize": False})) == own


def test_where_there_is_nothing_to_read_nobody_is_told(spec_of: SpecOf, tmp_path: Path) -> None:
    thread = read_ahead(spec_of(model_path=tmp_path / "nowhere", quantized_dir=tmp_path / "no_copies"))
    thread.join(timeout=60)
    assert not thread.is_alive()
