"""Loads the base model's own tokenizer, with a clear error if part of it is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def _incomplete(message: str) -> TrainingFailed:
    return TrainingFailed(
        ErrorCode.MODEL_INCOMPLETE,
        message,
        "download the model again (`brightrun-trainer models verify` names every damaged file)",
    )
