"""Opens an adapter on its base model: whole, or not at all."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from training.failures import in_brief


class CannotOpen(ValueError):
    """This adapter is not read whole on this base model; says why."""


def open_adapter(base: Any, folder: Path) -> PeftModel:
    """Attaches the adapter to the model. Raises CannotOpen also where PEFT would only warn, and answer with an adapter
    that is partly random, or with a part of it."""
    try:
        adapted = PeftModel.from_pretrained(base, folder)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            stored = set(file.keys())
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CannotOpen(in_brief(error)) from error
    read = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if read - stored:
        raise CannotOpen(f"it lacks weights for {len(read - stored)} places of its config")
    if stored - read:
        raise CannotOpen(f"PEFT {version('peft')} reads only {len(stored & read)} of its {len(stored)} tensors")
    adapted.eval()
    return adapted
