"""Finds the class that trains a base model, and its configuration, or explains why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from training.events import ErrorCode
from training.failures import TrainingFailed, in_brief
from training.files.model_folder import ModelFolder

_CHOOSE_ANOTHER = "choose a text model that transformers supports without remote code"
_UNLIMITED = 1_048_576


@dataclass(frozen=True)
class Architecture:
    """The class of a causal language model, and the configuration that it takes."""

    model_class: Any
    config: Any

    @property
    def context_length(self) -> int:
        """How many tokens the model reads; 1 Mi if its config does not say.

        Asked of the library, not of the file: config.json may leave out what equals its default.
        """
        text = self.config.get_text_config()
        found = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        return int(found or _UNLIMITED)

    def without_weights(self, **options: Any) -> Any:
        """Returns the model on the meta device, in bfloat16. Raises what the library raises for a bad config."""
        # Of exactly this class: AutoModelForCausalLM would choose by the configuration.
        with torch.device("meta"):
            return self.model_class._from_config(self.config, dtype=torch.bfloat16, **options)


def architecture_of(folder: ModelFolder, name: str) -> Architecture:
    """Reads config.json as AutoModelForCausalLM does: of some multimodal models, only the language model.

    Raises TrainingFailed(model_unsupported).
    """
    kind = str(folder.config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        own_code = ", and code that comes with a model is never run" if "auto_map" in folder.config else ""
        raise TrainingFailed(
            ErrorCode.MODEL_UNSUPPORTED,
            f"{name} is of the type {kind}, which transformers {version('transformers')} does not know{own_code}",
            _CHOOSE_ANOTHER,
        )
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:
        # Checks of some sixty classes, each with exceptions of its own.
        raise TrainingFailed(
            ErrorCode.MODEL_UNSUPPORTED, f"the config.json of {name} is not valid: {in_brief(error)}", _CHOOSE_ANOTHER
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        why = (
            "its language model cannot be trained by itself"
            if config.get_text_config() is not config
            else "models of that type do not write text"
        )
        raise TrainingFailed(
            ErrorCode.MODEL_UNSUPPORTED,
            f"{name} is of the type {kind}, which transformers does not load as a causal language model: {why}",
            "choose a text-only model, of the same family perhaps",
        )
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return Architecture(found, config if found.config_class is type(config) else config.get_text_config())
