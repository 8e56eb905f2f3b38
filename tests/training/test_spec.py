"""Hyperparameters as other trainers spell them: understood where they mean the same, else named with what to give."""

from __future__ import annotations

from typing import Any

import pytest

from training.spec import Hyperparameters, SpecInvalid, parse_row


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"n_epochs": 4}, "num_epochs", 4),
        ({"num_train_epochs": 4}, "num_epochs", 4),
        ({"r": 8}, "lora_rank", 8),
        ({"lora_r": 8}, "lora_rank", 8),
        ({"lr": 1e-4}, "learning_rate", 1e-4),
        ({"max_seq_length": 512}, "max_length", 512),
        ({"cutoff_len": 512}, "max_length", 512),
        ({"n_epochs": "auto"}, "num_epochs", 3),
        ({"batch_size": "auto"}, "batch_size", 4),
        ({"epochs": 4, "num_epochs": 4}, "num_epochs", 4),
    ],
)
def test_a_key_that_means_the_same_is_understood(given: dict[str, Any], field: str, value: object) -> None:
    row = parse_row(given, {})
    assert getattr(row.hyperparameters, field) == value
    assert row.unknown_keys == ()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"learning_rate_multiplier": 2}, "hyperparameters.learning_rate_multiplier (set learning_rate itself)"),
        (
            {"per_device_train_batch_size": 2},
            "hyperparameters.per_device_train_batch_size (batch_size is that of a whole optimizer step)",
        ),
        ({"val_size": 0.1}, "hyperparameters.val_size (set validation_fraction)"),
        ({"num_epochs": 4, "epochs": 5}, "hyperparameters.epochs (num_epochs is used)"),
        ({"suffix": "x"}, "hyperparameters.suffix"),
        ({"k" * 1000: 1}, "hyperparameters." + "k" * 60),
    ],
)
def test_a_key_that_changes_nothing_is_named(given: dict[str, Any], named: str) -> None:
    assert parse_row(given, {}).unknown_keys == (named,)


@pytest.mark.parametrize("key", ["model", "model_name_or_path"])
def test_a_base_model_under_another_key_is_never_replaced_by_the_default(key: str) -> None:
    with pytest.raises(SpecInvalid) as refused:
        parse_row({key: "Qwen/Qwen3-8B"}, {})
    (fault,) = refused.value.faults
    assert fault.field == f"hyperparameters.{key}" and "base_model" in fault.message and "Qwen3-8B" in fault.message
    row = parse_row({key: "Qwen/Qwen3-8B", "base_model": "Qwen/Qwen3-8B"}, {})
    assert row.unknown_keys == (f"hyperparameters.{key}",)


def test_what_was_parsed_is_parsed_again_as_it_is() -> None:
    chosen = parse_row({"r": 8, "lr": 1e-4, "n_epochs": 2, "cutoff_len": 512}, {}).hyperparameters
    assert Hyperparameters.model_validate_json(chosen.model_dump_json()) == chosen
