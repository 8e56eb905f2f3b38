"""Describes a trained adapter: the model card for people, the manifest's `serving` block for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.adapter.readers import peft_floor
from training.data.chat_template import ChatTemplate
from training.files.licence import licence_of
from training.files.model_folder import ModelFolder
from training.results.history import RunHistory
from training.results.model_card import Trained, model_card
from training.results.serving import serving_of


@dataclass(frozen=True)
class Described:
    """`card` is the text of README.md; `serving` becomes part of the manifest."""

    card: str
    serving: dict[str, Any]


@dataclass(frozen=True)
class Describer:
    """What is known of an adapter before its config is written. `used`: the settings, as the run used them."""

    folder: ModelFolder
    template: ChatTemplate
    journal: RunHistory
    used: Mapping[str, Any]
    summary: Mapping[str, Any]

    def __call__(self, adapter_config: Mapping[str, Any]) -> Described:
        """Describes the adapter with this adapter_config.json."""
        serving = serving_of(
            adapter_config,
            self.folder.text_config,
            peft=peft_floor(adapter_config),
            brings_template=self.template.is_default,
            thinking=self.template.thinking,
        )
        trained = Trained(
            counts=self.summary,
            settings=self.used["hyperparameters"],
            quantization=self.used["quantization"],
            compute_type=self.used["compute_type"],
            journal=self.journal,
            versions=self.summary["versions"],
        )
        return Described(model_card(serving, trained, licence_of(self.folder.path)), serving.as_dict())
