"""A merged GGUF takes two steps of hours: what one leaves is used by the same work only, and nothing is in vain."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import training.export.gguf
from tests.training.conftest import ModelOf
from tests.training.export.conftest import AdapterOf
from training.export.gguf import export_gguf
from training.failures import TrainingFailed


class Killed(BaseException):
    """What no handler of an export catches."""


def asked(base: Path, adapter: Path, into: Path) -> dict[str, Any]:
    return {"base": base, "adapter": adapter, "into": into, "form": "merged"}


def quietly(_done: int, _total: int) -> None:
    pass


def first_queries(file: Path) -> np.ndarray[Any, Any]:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    return np.array(tensors["blk.0.attn_q.weight"].data)


def test_what_the_export_of_another_adapter_left_is_not_used(
    tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny("qwen3")
    one, other = adapter_of(base, "one", lora_rank=4), adapter_of(base, "other", lora_rank=8)

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.export.gguf, "write_gguf_model", killed)
        export_gguf(asked(base, one, tmp_path / "model.gguf"), quietly)
    assert (tmp_path / ".model.gguf.merged").is_dir()

    export_gguf(asked(base, other, tmp_path / "model.gguf"), quietly)
    export_gguf(asked(base, other, tmp_path / "alone.gguf"), quietly)

    assert np.array_equal(first_queries(tmp_path / "model.gguf"), first_queries(tmp_path / "alone.gguf"))
    assert not list(tmp_path.glob(".*"))


def test_what_the_same_export_left_is_used(
    tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tiny("qwen3"), adapter_of(tiny("qwen3")), tmp_path / "model.gguf")

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.export.gguf, "write_gguf_model", killed)
        export_gguf(request, quietly)
    monkeypatch.setattr(training.export.gguf, "merge_adapter", killed)
    export_gguf(request, quietly)
    assert (tmp_path / "model.gguf").is_file()


def test_what_cannot_be_converted_is_refused_before_it_is_merged_and_leaves_nothing(
    tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tiny("qwen3"), adapter_of(tiny("qwen3")), tmp_path / "model.gguf")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gguf", None)
        patch.setattr(training.export.gguf, "merge_adapter", lambda *_, **__: pytest.fail("merged in vain"))
        with pytest.raises(TrainingFailed, match="is not installed"):
            export_gguf(request, quietly)

    def refuse(*_: Any, **__: Any) -> None:
        raise TrainingFailed("model_unsupported", "this tokenizer is unknown", "")  # type: ignore[arg-type]

    monkeypatch.setattr(training.export.gguf, "write_gguf_model", refuse)
    with pytest.raises(TrainingFailed, match="tokenizer"):
        export_gguf(request, quietly)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize("name", ["model.gguf", "folder"])
def test_what_its_user_made_meanwhile_is_kept(
    name: str, tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = asked(tiny("qwen3"), adapter_of(tiny("qwen3")), tmp_path / name)
    theirs = tmp_path / ("model.Modelfile" if name == "model.gguf" else "folder/notes.txt")
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("theirs")
    if name == "folder":
        # It appears while the export runs.
        (tmp_path / "folder").rename(tmp_path / "aside")
        write = training.export.gguf.write_gguf_model

        def meanwhile(*given: Any, **more: Any) -> Any:
            (tmp_path / "aside").rename(tmp_path / "folder")
            return write(*given, **more)

        monkeypatch.setattr(training.export.gguf, "write_gguf_model", meanwhile)
    with pytest.raises(TrainingFailed, match="exists already"):
        export_gguf(request, quietly)
    assert theirs.read_text() == "theirs"


def test_what_a_killed_export_wrote_is_removed_by_the_next(
    tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    request = asked(tiny("qwen3"), adapter_of(tiny("qwen3")), tmp_path / "model.gguf")
    # No process has such a number.
    gone = 2**31 - 1
    for left in (f".model.gguf.{gone}.part", f"..model.gguf.{gone}.part.{gone}.part"):
        (tmp_path / left).write_bytes(b"half a model")
    kept = (f".model.gguf.{os.getppid()}.part", f".other.gguf.{gone}.part")
    for name in kept:
        (tmp_path / name).write_bytes(b"of somebody else")
    export_gguf({**request, "form": "adapter"}, quietly)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "model.gguf", *kept}
