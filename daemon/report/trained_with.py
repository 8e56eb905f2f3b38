"""Says what a job is trained with: in words for its story, as the row's `trained_with`, beside what it asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from daemon.terminal.format import count
from training import events
from training.spec import GpuConfig, Hyperparameters, by_own_names

# Above the settings that the trainer resolved, and below them.
_MODEL = ("base_model", "model_revision")
_MACHINE = ("compute_type", "quantization", "device", "num_gpus", "gpu_type", "trainable_parameters")


def model_in_words(name: str, revision: str | None, asked: str | None, of_earlier_attempt: str | None) -> str:
    """Says which base model is used, and who chose it."""
    if asked is not None:
        chosen = ""
    elif of_earlier_attempt is not None:
        chosen = ", as in the earlier attempt (the job names none)"
    else:
        chosen = ", the service's default (the job names none)"
    return f"The base model is {name}{chosen}" + (f", revision {revision[:12]}." if revision else ".")


def plan_in_words(plan: events.Planned) -> str:
    computed = f", computed in {plan.compute_type}" if plan.compute_type else ""
    return (
        f"{_side(plan.train_answers, plan.train_conversations, plan.train_examples)} to train on, "
        f"{_side(plan.validation_answers, plan.validation_conversations, plan.validation_examples)} held out, "
        f"{plan.train_tokens:,} tokens an epoch, "
        f"{count(plan.total_steps, 'step')} in {count(plan.total_epochs, 'epoch')}{computed}"
        f"{_settings_in_words(plan.trained_with)}."
    )


def _side(answers: int | None, conversations: int | None, examples: int) -> str:
    if not examples or answers is None or conversations is None:
        return count(examples, "example") if examples else "none"
    return f"{count(answers, 'answer')} of {count(conversations, 'conversation')}"


def _settings_in_words(trained_with: Mapping[str, Any]) -> str:
    """The settings that are asked for most; all of them are in the event's data."""
    used = _object(trained_with.get("hyperparameters"))
    words = {
        "learning_rate": "learning rate",
        "batch_size": "batch size",
        "lora_rank": "rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "warmup_steps": "warm-up steps",
        "max_length": "max length",
        "seed": "seed",
    }
    shown = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in used.items()}
    said = [f"{word} {shown[name]}" for name, word in words.items() if used.get(name) is not None]
    return f"; {', '.join(said)}" if said else ""


def adapter_settings(event: events.AdapterAttached, trained_with: Mapping[str, Any]) -> dict[str, Any]:
    """What the loaded model decided, as part of the settings so far."""
    decided = {"target_modules": list(event.target_modules), "packing": event.packing}
    return {
        "hyperparameters": {**_object(trained_with.get("hyperparameters")), **decided},
        "trainable_parameters": event.trainable_parameters,
    }


def adapter_in_words(event: events.AdapterAttached) -> str:
    packed = "short conversations are packed into one row" if event.packing else "conversations are not packed"
    modules = ", ".join(event.target_modules)
    return f"The adapter is attached to {modules}: {event.trainable_parameters:,} parameters learn, {packed}."


def asked_and_used(hyperparameters: object, gpu_config: object, trained_with: object) -> list[tuple[str, Any, Any]]:
    """Returns each setting as (name, asked, used), to be shown side by side; empty until an attempt knows what it uses.

    All are values of a row: anything that JSON holds."""
    if not isinstance(trained_with, Mapping):
        return []
    asked = by_own_names(Hyperparameters, _object(hyperparameters))
    hardware = by_own_names(GpuConfig, _object(gpu_config))
    asked |= {name: hardware.get(name) for name in _MACHINE}
    # The row's JSON has an order of its own: here it is that of the reference.
    used = {name: trained_with.get(name) for name in _MODEL}
    used |= by_own_names(Hyperparameters, _object(trained_with.get("hyperparameters")))
    used |= {name: trained_with.get(name) for name in _MACHINE}
    # A job that fails early has used little: what it asked for stands in the same order all the same.
    names = dict.fromkeys((*_MODEL, *Hyperparameters.model_fields, *used, *asked))
    ordered = [name for name in names if name not in _MACHINE] + list(_MACHINE)
    pairs = [(name, asked.get(name), used.get(name)) for name in ordered]
    return [pair for pair in pairs if pair[1] is not None or pair[2] is not None]


def setting_in_words(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(setting_in_words, value))
    if isinstance(value, float):
        # 32.0 is what a row asks for as 32.
        return f"{value:.15g}"
    return value if isinstance(value, str) else json.dumps(value)


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
