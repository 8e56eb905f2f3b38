"""A base model for a card waits in the host's memory, in 4 bits, between the jobs that use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

import training.base.loaded_model
from tests.tiny_models import ARCHITECTURES
from tests.training.conftest import IN_BOTH_TYPES, RecordedEvents, SpecOf
from training.base.load import load_base_model, move
from training.base.loaded_model import Base, load_base, may_be_held
from training.files.model_folder import open_model_folder
from training.spec import JobSpec


def _with_a_copy(spec: JobSpec, *, device: str) -> Base:
    """Leaves the 4-bit copy that a job on `device` makes, and returns the base model of the next job."""
    load_base_model(spec, open_model_folder(spec.model_path, spec.base_model), RecordedEvents())
    return Base.of(spec).model_copy(update={"device": device})


def _tensors_of(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yields every tensor that a model can reach, wherever its modules keep it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
        yield from _tensors_of(getattr(value, "quant_state", None), seen)
    elif isinstance(value, torch.nn.Module | bnb.QuantState):
        yield from _tensors_of(vars(value), seen)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors_of(each, seen)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from _tensors_of(each, seen)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_of_a_moved_model_stays_behind(
    architecture: str, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that stayed would be found in the first step on a card, which not every machine has: so each is seen
    to be moved."""
    spec = spec_of(architecture)
    model = load_base_model(spec, open_model_folder(spec.model_path, spec.base_model))
    reachable = {tensor.data_ptr() for tensor in _tensors_of(model, set())}
    moved = set()

    def to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        assert device.type == "cuda"
        moved.add(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    move(model, torch.device("cuda", 0))
    assert len(reachable) > 20 and reachable - moved == set()


@IN_BOTH_TYPES
def test_the_model_that_waits_is_the_one_that_the_copy_holds(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of("qwen3_moe", quantized_dir=tmp_path / "copies", compute_type="bfloat16")
    held = load_base(_with_a_copy(spec, device="cuda"))
    assert held is not None
    cold = load_base_model(spec, open_model_folder(spec.model_path, spec.base_model))
    ids_BT = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(held.model(input_ids=ids_BT).logits, cold(input_ids=ids_BT).logits)


def test_only_what_lies_on_the_volume_in_4_bits_waits_for_a_card(
    spec_of: SpecOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(quantized_dir=tmp_path / "copies", compute_type="bfloat16")
    for_a_card, folder = Base.of(spec).model_copy(update={"device": "cuda"}), Base.of(spec).open()
    # A CPU would quantise it for minutes; a job on a card does it in seconds.
    assert not may_be_held(for_a_card, folder, 1000, 2000) and load_base(for_a_card) is None
    assert may_be_held(Base.of(spec), folder, 1000, 2000)
    _with_a_copy(spec, device="cuda")
    assert may_be_held(for_a_card, folder, 1000, 2000)
    assert not may_be_held(for_a_card, folder, 2001, 2000)
    # The job itself needs no host memory for it, so it takes none that is scarce.
    monkeypatch.setattr(training.base.loaded_model, "free_bytes", lambda: 1999)
    assert not may_be_held(for_a_card, folder, 1000, 2000) and may_be_held(Base.of(spec), folder, 1000, 2000)


def test_a_damaged_copy_is_left_to_the_job_which_tells_of_it(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of(quantized_dir=tmp_path / "copies", compute_type="bfloat16")
    for_a_card = _with_a_copy(spec, device="cuda")
    (file,) = (tmp_path / "copies").glob("*/*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert load_base(for_a_card) is None
    voice = RecordedEvents()
    load_base_model(spec, open_model_folder(spec.model_path, spec.base_model), voice)
    assert [notice.code for notice in voice.all("notice")] == ["quantized_copy_refused"]
