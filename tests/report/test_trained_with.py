"""What a job is trained with, in words: one number as one number, one thing as one thing, always in one order."""

from __future__ import annotations

from daemon.report.trained_with import asked_and_used, plan_in_words, setting_in_words
from training import events

ASKED = {"rank": 16, "alpha": 32, "learning_rate": 2e-4, "epochs": 1}
GPU = {"type": "H100", "count": 1}


def test_the_same_number_looks_the_same_on_both_sides() -> None:
    used = {"base_model": "tiny", "hyperparameters": {"lora_alpha": 32.0, "learning_rate": 2e-4}, "num_gpus": 1}
    pairs = asked_and_used(ASKED, GPU, used)
    shown = {name: (setting_in_words(asked), setting_in_words(now)) for name, asked, now in pairs}
    assert shown["lora_alpha"] == ("32", "32") and shown["learning_rate"] == ("0.0002", "0.0002")
    assert shown["num_gpus"] == ("1", "1") and shown["gpu_type"] == ("H100", "–")
    assert setting_in_words(0.1 + 0.2) == "0.3" and setting_in_words(1e-8) == "1e-08"


def test_a_job_that_failed_early_shows_its_settings_in_the_order_of_one_that_trained() -> None:
    settings = {"learning_rate": 1, "num_epochs": 1, "lora_rank": 1, "lora_alpha": 1, "schedule": "cosine"}
    whole = {"base_model": "tiny", "hyperparameters": settings, "device": "cpu", "num_gpus": 1}
    early, late = (
        [name for name, _, _ in asked_and_used(ASKED, GPU, used)] for used in ({"base_model": "tiny"}, whole)
    )
    assert early == [name for name in late if name in early]
    assert early == ["base_model", "learning_rate", "num_epochs", "lora_rank", "lora_alpha", "num_gpus", "gpu_type"]


def test_a_plan_counts_as_people_do() -> None:
    plan = events.Planned(
        job_id="x", train_examples=1, validation_examples=0, train_answers=1, validation_answers=0,
        train_conversations=1, validation_conversations=0, train_tokens=12345, trained_tokens=10, total_steps=1,
        total_epochs=1, max_length=64,
    )  # fmt: skip
    assert plan_in_words(plan) == (
        "1 answer of 1 conversation to train on, none held out, 12,345 tokens an epoch, 1 step in 1 epoch."
    )
