"""Hidden failures: each is reported with its code and a message for the user."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import training.loop.loss
from tests.tiny_models import conversation, write_conversations, write_dataset
from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, ROUNDING, ModelOf, RecordedEvents, SpecOf, train
from training.base import dtype
from training.check import check_spec
from training.compute import ComputeType
from training.events import ErrorCode
from training.failures import TrainingFailed, diagnose, is_out_of_memory
from training.files.free_memory import Memory
from training.loop.checkpoint import CheckpointShelf
from training.recipe import prepare
from training.spec import JobSpec


def _copy(folder: Path, goal: Path) -> Path:
    shutil.copytree(folder, goal)
    return goal


def _refusal(spec: JobSpec) -> TrainingFailed:
    with pytest.raises(TrainingFailed) as refused:
        train(spec)
    assert refused.value.hint
    return refused.value


# --- NaN and infinity


@ON_A_CARD_TOO
def test_a_run_that_diverges_stops_and_advises_a_lower_learning_rate(
    spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training.loop.loss.AnswerLoss.__call__
    calls = 0

    def poisoned(self: Any, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        total, count = whole(self, inputs)
        return (total * math.nan if torch.is_grad_enabled() and calls > 6 else total), count

    monkeypatch.setattr(training.loop.loss.AnswerLoss, "__call__", poisoned)
    spec = spec_of(learning_rate=2e-3)
    refused = _refusal(spec)
    assert refused.code == "non_finite_loss" and "diverged at step" in refused.message
    assert refused.hint == "lower learning_rate (current 0.002) and submit again"
    assert not spec.output_dir.exists()


@ON_A_CARD_TOO
def test_a_learning_rate_that_explodes_never_ends_as_success(spec_of: SpecOf) -> None:
    """The library's default logs loss 0.0 for NaN; ours must never turn NaN into zero."""
    spec = spec_of(learning_rate=0.1, num_epochs=3)
    try:
        voice = train(spec)
    except TrainingFailed as error:
        assert error.code == "non_finite_loss"
    else:
        assert all(event.loss > 0 for event in voice.all("progress"))


# --- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_is_recognised_in_every_guise(error: BaseException, spec_of: SpecOf) -> None:
    assert is_out_of_memory(error)
    found = diagnose(error, spec_of(batch_size=8, lora_rank=32, max_length=512))
    assert found.code is ErrorCode.OUT_OF_MEMORY
    assert "reduce batch_size (current 8), lora_rank (current 32) or max_length (current 512)" in found.hint


def test_other_errors_of_the_card_are_not_taken_for_memory() -> None:
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@ON_A_CARD_TOO
@IN_BOTH_TYPES
@pytest.mark.parametrize("packing", [True, False])
def test_out_of_memory_halves_the_micro_batch_and_loses_no_step(
    packing: bool, compute_type: ComputeType, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = train(spec_of(name="calm", packing=packing, validation_fraction=0.0, num_epochs=1, lora_dropout=0.0))
    _limit_memory(monkeypatch, conversations=1)
    tight = train(spec_of(name="tight", packing=packing, validation_fraction=0.0, num_epochs=1, lora_dropout=0.0))
    notices = [event for event in tight.all("notice") if event.code == "out_of_memory_recovered"]
    halved = [event.data["micro_batch_tokens"] for event in notices]
    assert len(halved) >= 2 and halved == sorted(set(halved), reverse=True)
    assert "the batch size stays 4" in notices[0].message
    losses, expected = tight.all("progress"), calm.all("progress")
    assert len(losses) == len(expected)
    assert all(
        math.isclose(a.loss, b.loss, rel_tol=ROUNDING[compute_type]) for a, b in zip(losses, expected, strict=True)
    )


def test_out_of_memory_with_one_conversation_fails_with_the_advice(
    spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    _limit_memory(monkeypatch, conversations=0)
    refused = _refusal(spec_of(batch_size=4, lora_rank=8))
    assert refused.code == "out_of_memory"
    assert "single conversation" in refused.message
    assert "reduce batch_size (current 4), lora_rank (current 8) or max_length (current " in refused.hint


def _limit_memory(monkeypatch: pytest.MonkeyPatch, conversations: int) -> None:
    """A GPU on which a forward pass of more conversations than this does not fit."""
    whole = training.loop.loss.AnswerLoss.__call__

    def limited(self: Any, inputs: Any) -> Any:
        ends = inputs.get("cu_seq_lens_q")
        if (len(inputs["input_ids"]) if ends is None else len(ends) - 1) > conversations:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return whole(self, inputs)

    monkeypatch.setattr(training.loop.loss.AnswerLoss, "__call__", limited)


# --- the model's files


def test_a_model_that_is_not_there_is_named(spec_of: SpecOf, tmp_path: Path) -> None:
    refused = _refusal(spec_of(model_path=tmp_path / "nowhere"))
    assert refused.code == "model_not_found" and "tiny/qwen3" in refused.message


def test_a_truncated_weight_file_is_named(spec_of: SpecOf, tiny: ModelOf, tmp_path: Path) -> None:
    folder = _copy(tiny("qwen3"), tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused = _refusal(spec_of(model_path=folder))
    assert refused.code == "model_incomplete" and "model.safetensors has" in refused.message


def test_an_empty_weight_file_is_named(spec_of: SpecOf, tiny: ModelOf, tmp_path: Path) -> None:
    folder = _copy(tiny("qwen3"), tmp_path / "empty")
    (folder / "model.safetensors").write_bytes(b"")
    assert "(0 bytes) has no readable" in _refusal(spec_of(model_path=folder)).message


def test_a_missing_shard_is_named(spec_of: SpecOf, tiny: ModelOf, tmp_path: Path) -> None:
    folder = _copy(tiny("qwen3"), tmp_path / "shards")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused = _refusal(spec_of(model_path=folder))
    assert refused.code == "model_incomplete" and "shard model-00002-of-00002.safetensors is missing" in refused.message


def test_a_missing_tensor_is_refused_and_not_filled_with_random_numbers(
    spec_of: SpecOf, tiny: ModelOf, tmp_path: Path
) -> None:
    folder = _copy(tiny("qwen3"), tmp_path / "lacking")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused = _refusal(spec_of(model_path=folder))
    assert refused.code == "model_incomplete" and "model.layers.1.mlp.up_proj.weight" in refused.message


def test_pickled_weights_are_never_loaded(spec_of: SpecOf, tiny: ModelOf, tmp_path: Path) -> None:
    folder = _copy(tiny("qwen3"), tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused = _refusal(spec_of(model_path=folder))
    assert refused.code == "model_incomplete" and "pickled" in refused.message


@pytest.mark.parametrize(
    ("files", "words"),
    [(("tokenizer.json", "tokenizer_config.json"), "no tokenizer files"), (("config.json",), "config.json is missing")],
)
def test_missing_files_are_named(
    files: tuple[str, ...], words: str, spec_of: SpecOf, tiny: ModelOf, tmp_path: Path
) -> None:
    folder = _copy(tiny("qwen3"), tmp_path / "hull")
    for name in files:
        (folder / name).unlink()
    refused = _refusal(spec_of(model_path=folder))
    assert refused.code == "model_incomplete" and words in refused.message


def test_an_unknown_architecture_is_refused_without_remote_code(spec_of: SpecOf, tiny: ModelOf, tmp_path: Path) -> None:
    folder = _copy(tiny("qwen3"), tmp_path / "strange")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "nope"}
    (folder / "config.json").write_text(json.dumps(config))
    assert _refusal(spec_of(model_path=folder)).code in ("model_unsupported", "model_incomplete")


# --- data that only a template or a length limit refuses


def test_conversations_that_are_all_too_long_are_refused_with_the_length(spec_of: SpecOf, tmp_path: Path) -> None:
    spec = spec_of(dataset_path=write_conversations(tmp_path / "long.jsonl", 6), max_length=16)
    refused = _refusal(spec)
    assert refused.code == "dataset_invalid" and "no conversation fits into max_length 16" in refused.message
    assert "raise max_length" in refused.hint


def test_a_model_without_a_template_gets_the_default_and_says_so(
    spec_of: SpecOf, tiny: ModelOf, tmp_path: Path
) -> None:
    folder = _copy(tiny("llama"), tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    spec = spec_of("llama", model_path=folder)
    voice = train(spec)
    assert "default_template" in [event.code for event in voice.all("notice")]
    assert "### Assistant:" in (spec.output_dir / "chat_template.jinja").read_text()


def test_a_single_conversation_trains_without_validation_and_says_so(spec_of: SpecOf, tmp_path: Path) -> None:
    voice = train(spec_of(dataset_path=write_dataset(tmp_path / "one.jsonl", [conversation(1)])))
    assert "no_validation" in [event.code for event in voice.all("notice")]
    assert voice.all("adapter_saved")[0].summary["final_validation_loss"] is None


# --- disk and checkpoints


def test_a_full_disk_has_a_name(spec_of: SpecOf) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("... No space left on device (28)")):
        assert diagnose(error, spec_of(name=type(error).__name__)).code is ErrorCode.DISK_FULL


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    shelf = CheckpointShelf(tmp_path / "shelf", {"seed": 1})
    for step in (1, 2, 3):
        (shelf.prepare() / "weights").write_bytes(bytes([step]) * 100)
        shelf.publish(shelf.staging, step)
    assert sorted(path.name for path in (tmp_path / "shelf").iterdir()) == ["checkpoint-2", "checkpoint-3"]
    (tmp_path / "shelf" / "checkpoint-3" / "weights").write_bytes(b"\xff" * 100)
    found, damaged = shelf.newest()
    assert found is not None and found.step == 2
    assert "a different hash" in damaged[0].reason
    shutil.rmtree(tmp_path / "shelf" / "checkpoint-2")
    assert shelf.newest()[0] is None


def test_a_half_written_checkpoint_never_counts(tmp_path: Path) -> None:
    shelf = CheckpointShelf(tmp_path / "shelf", {})
    (shelf.prepare() / "weights").write_bytes(b"half")
    (tmp_path / "shelf" / "checkpoint-9").mkdir()
    found, damaged = shelf.newest()
    assert found is None and "manifest" in damaged[0].reason


def test_a_checkpoint_of_another_run_is_not_continued(tmp_path: Path) -> None:
    ours = CheckpointShelf(tmp_path / "shelf", {"learning_rate": 1e-4})
    (ours.prepare() / "weights").write_bytes(b"x")
    ours.publish(ours.staging, 1)
    found, damaged = CheckpointShelf(tmp_path / "shelf", {"learning_rate": 2e-4}).newest()
    assert found is None and "learning_rate differ" in damaged[0].reason


# --- before anything heavy


def test_the_preflight_gives_the_same_verdict_as_the_run(spec_of: SpecOf, tmp_path: Path) -> None:
    good = check_spec(spec_of(name="good", cost_per_hour=2.0))
    assert good.ok and good.estimate is not None and good.estimate["cost"] > 0
    assert good.estimate["adapter_parameters"] > 0 and good.data["total_steps"] > 0
    bad = spec_of(name="bad", dataset_path=write_dataset(tmp_path / "bad.jsonl", [{"a": 1}]))
    assert check_spec(bad).errors[0]["message"] == _refusal(bad).message


def test_a_model_that_cannot_fit_the_card_is_refused_before_loading(spec_of: SpecOf) -> None:
    verdict = check_spec(spec_of(), Memory.all_free(1000))
    assert verdict.errors[0]["code"] == "out_of_memory" and "weights alone" in verdict.errors[0]["message"]


def test_a_card_that_others_have_filled_fails_the_attempt_before_loading_and_not_the_job(
    spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's answer, of a card of 80 GiB with 79.9 in use: what is free decides, and not what the card has."""
    spec = spec_of().model_copy(update={"device": "cuda"})
    asked = []

    def mem_get_info() -> tuple[int, int]:
        asked.append(0)
        return 100_000, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(dtype, "_RELEASE_SECONDS", 0.6)
    with pytest.raises(TrainingFailed) as refused:
        prepare(spec, RecordedEvents())
    assert refused.value.code == "out_of_memory" and refused.value.transient
    assert "this GPU has 80.0 GiB, of which other processes hold 80.0 GiB" in refused.value.message
    assert "nvidia-smi" in refused.value.hint
    # Memory of a process that has just been killed comes back while we wait.
    assert len(asked) > 1
    asked.clear()

    def freed_at_last() -> tuple[int, int]:
        return mem_get_info() if len(asked) < 4 else (70 * 2**30, 80 * 2**30)

    monkeypatch.setattr(torch.cuda, "mem_get_info", freed_at_last)
    monkeypatch.setattr(dtype, "_RELEASE_SECONDS", 30.0)
    voice = RecordedEvents()
    prepare(spec, voice)
    assert len(asked) == 4
    assert not [notice for notice in voice.all("notice") if notice.code == "memory_tight"]


def test_the_preflight_for_a_card_of_a_given_size_takes_it_as_free(spec_of: SpecOf) -> None:
    assert check_spec(spec_of(), Memory.all_free(80 * 2**30)).ok
