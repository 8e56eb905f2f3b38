"""One run, observed: its events, its measurements, and that its shortcuts change no number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import training.data.plan
import training.recipe
from tests.tiny_models import ARCHITECTURES
from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, ROUNDING, ModelOf, SpecOf, train
from training.base.dtype import compute_dtype
from training.base.sequence_packing import packs_without_leaks
from training.compute import ComputeType
from training.data.micro_batches import halve, in_groups, micro_batches, pack, packing_pays, tokens_in
from training.loop.loss import AnswerLoss
from training.results.history import RunHistory


def _plain(folder: Path, compute_type: ComputeType) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype("cpu", compute_type))


def _batch(rows: int = 3, length: int = 20) -> dict[str, torch.Tensor]:
    ids_BT = torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(2))
    labels_BT = ids_BT.clone()
    labels_BT[:, : length // 2] = -100
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": labels_BT}


@ON_A_CARD_TOO
@IN_BOTH_TYPES
def test_a_run_tells_its_story_in_order_and_learns(spec_of: SpecOf) -> None:
    voice = train(spec_of(num_epochs=3, sample_prompts=None))
    kinds = voice.kinds()
    assert kinds.index("planned") < kinds.index("evaluated") < kinds.index("progress")
    assert kinds[-1] == "adapter_saved"
    planned = voice.all("planned")[0]
    steps = voice.all("progress")
    assert [event.step for event in steps] == list(range(1, planned.total_steps + 1))
    assert len(voice.all("evaluated")) == 4
    assert all(event.grad_norm > 0 and event.tokens_per_second > 0 for event in steps)
    assert steps[-1].tokens_seen == 3 * planned.train_tokens
    samples = voice.all("sample")
    assert [s.when for s in samples] == ["before"] * 2 + ["after"] * 2 and samples[0].prompt == samples[2].prompt
    summary = voice.all("adapter_saved")[0].summary
    assert summary["final_validation_loss"] < summary["initial_validation_loss"]
    assert math.isclose(summary["perplexity"], math.exp(summary["final_validation_loss"]))
    assert summary["total_steps"] == planned.total_steps and 1 <= summary["overall_score"] <= 5
    # Every setting is told as it is used, whoever chose it.
    used = planned.trained_with["hyperparameters"]
    assert all(value is not None for name, value in used.items() if name not in NOT_RESOLVED)
    assert (used["lora_alpha"], used["max_length"]) == (2 * used["lora_rank"], planned.max_length)
    config = json.loads((Path(voice.all("adapter_saved")[0].path) / "adapter_config.json").read_text())
    (attached,) = voice.all("adapter_attached")
    assert sorted(attached.target_modules) == sorted(config["target_modules"])
    assert (used["lora_rank"], used["lora_alpha"]) == (config["r"], config["lora_alpha"])
    assert attached.trainable_parameters == summary["trainable_parameters"]


# What the loaded model decides, and what is never done when it is not asked for.
NOT_RESOLVED = {"packing", "target_modules", "early_stopping_patience", "push_to_hub", "deploy"}


@IN_BOTH_TYPES
def test_the_best_evaluation_is_the_one_that_is_kept(spec_of: SpecOf) -> None:
    # The learning rate is too high: later epochs are worse than an earlier one.
    voice = train(spec_of(num_epochs=6, learning_rate=5e-2, early_stopping_patience=2))
    losses = [event.validation_loss for event in voice.all("evaluated")][1:]
    assert voice.all("adapter_saved")[0].summary["final_validation_loss"] == min(losses)
    if len(losses) < 6:
        assert "stopped_early" in [event.code for event in voice.all("notice")]
        assert losses.index(min(losses)) == len(losses) - 3


@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sliced_loss_and_its_gradient_are_the_plain_ones(
    architecture: str, compute_type: ComputeType, tiny: ModelOf
) -> None:
    model = _plain(tiny(architecture), compute_type)
    batch = _batch()
    ours = AnswerLoss(model)
    assert ours._head_is_plain
    total, count = ours(batch)
    assert count == 3 * 10
    total.backward()
    gradient = model.model.layers[0].input_layernorm.weight.grad.clone()
    model.zero_grad()
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    expected = functional.cross_entropy(
        logits_BTV.reshape(-1, logits_BTV.shape[-1]), batch["labels"][:, 1:].reshape(-1), reduction="sum"
    )
    expected.backward()
    reference = model.model.layers[0].input_layernorm.weight.grad
    assert math.isclose(total.item(), expected.item(), rel_tol=ROUNDING[compute_type])
    assert (gradient - reference).norm() / reference.norm() < 10 * ROUNDING[compute_type]


@IN_BOTH_TYPES
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe", "mixtral"])
def test_packed_conversations_give_the_losses_of_separate_ones(
    architecture: str, compute_type: ComputeType, tiny: ModelOf
) -> None:
    model = _plain(tiny(architecture), compute_type).eval()
    assert packs_without_leaks(model)
    batch = _batch()
    loss = AnswerLoss(model)
    packed = pack(list(batch["input_ids"]))
    labels = batch["labels"].clone()
    labels[:, 0] = -100
    together, count = loss({**packed, "labels": labels.reshape(1, -1)})
    apart = sum(loss({key: value[row : row + 1] for key, value in batch.items()})[0].item() for row in range(3))
    assert count == 3 * 10 and math.isclose(together.item(), apart, rel_tol=ROUNDING[compute_type])


@ON_A_CARD_TOO
@IN_BOTH_TYPES
def test_packed_and_padded_runs_learn_the_same(compute_type: ComputeType, spec_of: SpecOf) -> None:
    packed = train(spec_of(name="packed", packing=True, lora_dropout=0.0))
    padded = train(spec_of(name="padded", packing=False, lora_dropout=0.0))
    for left, right in zip(packed.all("progress"), padded.all("progress"), strict=True):
        assert math.isclose(left.loss, right.loss, rel_tol=ROUNDING[compute_type])


@ON_A_CARD_TOO
@IN_BOTH_TYPES
def test_accumulated_micro_batches_equal_one_batch(
    compute_type: ComputeType, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(spec_of(name="whole", lora_dropout=0.0, packing=False, num_epochs=1))
    monkeypatch.setitem(training.data.plan._TOKENS_PER_MICRO_BATCH, "cpu", 1)
    parts = train(spec_of(name="parts", lora_dropout=0.0, packing=False, num_epochs=1))
    for left, right in zip(whole.all("progress"), parts.all("progress"), strict=True):
        assert math.isclose(left.loss, right.loss, rel_tol=ROUNDING[compute_type])
        assert math.isclose(left.grad_norm, right.grad_norm, rel_tol=10 * ROUNDING[compute_type])


def test_halves_hold_the_same_conversations() -> None:
    batch = _batch(rows=3)
    left, right = halve(batch) or ({}, {})
    assert torch.equal(torch.cat([left["input_ids"], right["input_ids"]]), batch["input_ids"])
    packed = {**pack(list(batch["input_ids"])), "labels": batch["labels"].reshape(1, -1)}
    left, right = halve(packed) or ({}, {})
    assert torch.equal(torch.cat([left["labels"], right["labels"]], dim=1), packed["labels"])
    assert right["position_ids"][0, 0] == 0 and halve({**left, **pack([batch["input_ids"][0]])}) is None


def test_a_step_is_divided_by_tokens_into_few_parts_that_fit() -> None:
    lengths = [7, 12, 9, 3, 30, 5]
    rows = [torch.arange(1, length + 1) for length in lengths]
    labels = [row + 100 for row in rows]
    packed = {**pack(rows), "labels": torch.cat(labels)[None]}
    together = torch.nn.utils.rnn.pad_sequence
    padded = {
        "input_ids": together(rows, batch_first=True),
        "labels": together(labels, batch_first=True, padding_value=-100),
        "attention_mask": together([torch.ones_like(row) for row in rows], batch_first=True),
    }
    for whole, parts in ((packed, 4), (padded, 4)):
        divided = micro_batches(whole, most_tokens=20)
        assert len(divided) == parts and [tokens_in(part) > 20 for part in divided].count(True) == 1
        seen = torch.cat([part["labels"].flatten() for part in divided])
        assert sorted(seen[seen > 0].tolist()) == sorted(torch.cat(labels).tolist())
        assert micro_batches(whole, tokens_in(whole))[0] is whole
    assert in_groups([], 10, padded=True) == []


class _Reading:
    """A GPU on which a pass takes a thousand bytes."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity

    def begin(self) -> int:
        return 0

    def peak(self) -> int:
        return 1000

    def capacity(self) -> int:
        return self._capacity


@pytest.mark.parametrize(
    ("capacity", "expected"), [(1_000_000, 400), (4000, 200), (2000, None), (1000, 50), (0, 12)], ids=str
)
def test_a_pass_before_the_first_step_finds_what_the_card_takes_and_changes_nothing(
    capacity: int, expected: int | None, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training.data.plan._TOKENS_PER_MICRO_BATCH, "cpu", 100)
    chosen = {"num_epochs": 1, "validation_fraction": 0.0}
    unasked = spec_of(name="unasked", **chosen)
    steps = train(unasked).all("progress")
    monkeypatch.setattr(training.recipe, "gauge_of", lambda _device: _Reading(capacity))
    asked = spec_of(name="asked", checkpoint_seconds=1e-4, **chosen)
    voice = train(asked)
    found = [event.data["micro_batch_tokens"] for event in voice.all("notice") if event.code == "micro_batch_fitted"]
    assert found == ([] if expected is None else [expected])
    if expected is None:
        # Dropout must also be the same.
        ours, theirs = (spec.output_dir / "adapter_model.safetensors" for spec in (asked, unasked))
        assert ours.read_bytes() == theirs.read_bytes()
    assert [event.tokens_seen for event in voice.all("progress")] == [event.tokens_seen for event in steps]
    kept = RunHistory.load(asked.checkpoint_dir / f"checkpoint-{len(steps)}")
    assert kept.micro_batch_tokens == expected


def test_texts_lie_end_to_end_where_padding_would_cost_more_than_looking_past_each_other() -> None:
    def pays(lengths: list[int], hidden_size: int, most_tokens: int) -> bool:
        return packing_pays(lengths, hidden_size, most_tokens, dense=True)

    assert pays([30, 30, 30, 300], hidden_size=576, most_tokens=2048)
    assert not pays([300, 300, 300, 300], hidden_size=576, most_tokens=2048)
    # The larger the model, the less attention matters.
    assert pays([200, 150, 200, 180], 4096, 8192) and not pays([200, 150, 200, 180], 128, 8192)
    assert not pays([50], 576, 2048)


def test_texts_of_different_lengths_lie_end_to_end_where_attention_sees_each_alone() -> None:
    assert packing_pays([200, 150, 200, 180], 128, 8192, dense=False)
    assert packing_pays([4000] * 7 + [3900], 128, 8192, dense=False)
    assert not packing_pays([4000] * 7 + [3900], 128, 8192, dense=True)
    # Without padding both cost the same, and side by side is one product.
    assert not packing_pays([300] * 4, 576, 2048, dense=False)


def test_the_base_models_files_are_untouched(spec_of: SpecOf) -> None:
    spec = spec_of()
    before = {path: path.read_bytes() for path in Path(spec.model_path).iterdir()}
    train(spec)
    assert {path: path.read_bytes() for path in Path(spec.model_path).iterdir()} == before
