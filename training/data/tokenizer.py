"""Loads the base model's own tokenizer, with a clear error if part of it is missing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from training.events import ErrorCode
from training.failures import TrainingFailed
from training.files.model_folder import ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Missing files give an empty vocabulary without an error; no real one is this small.
_SMALLEST_VOCABULARY = 16


def load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """Loads it with a padding token. Raises TrainingFailed(model_incomplete) if its vocabulary is empty."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise _incomplete(f"the base model's tokenizer cannot be loaded ({type(error).__name__})") from error
    if len(tokenizer) < _SMALLEST_VOCABULARY:
        raise _incomplete(f"the base model's tokenizer has a vocabulary of {len(tokenizer)}: its files are missing")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_tokens(folder: ModelFolder) -> frozenset[int]:
    """Returns the tokens at which a server stops generating, as the model's own files say."""
    found: set[int] = set()
    for source in (_generation_config(folder), folder.config, folder.text_config):
        named = source.get("eos_token_id")
        found.update(token for token in (named if isinstance(named, list) else [named]) if type(token) is int)
    return frozenset(found)


def _generation_config(folder: ModelFolder) -> dict[str, Any]:
    try:
        config = json.loads((folder.path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _incomplete(message: str) -> TrainingFailed:
    return TrainingFailed(
        ErrorCode.MODEL_INCOMPLETE,
        message,
        "download the model again (`brightrun-trainer models verify` names every damaged file)",
    )
