"""Says from config.json alone whether a model is published in a form that training can read: in 16 (or 32) bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TAKE_16_BITS = "choose a copy of this model in 16 bits (BF16); its 4-bit weights are made here, while it is loaded"

# What users call the methods that name no number of bits.
_WORDS = {
    "fp8": "8 bits (FP8)",
    "fbgemm_fp8": "8 bits (FP8)",
    "mxfp8": "8 bits (MXFP8)",
    "mxfp4": "4 bits (MXFP4)",
    "nvfp4": "4 bits (NVFP4)",
    "awq": "4 bits (AWQ)",
}


def fault_of_form(config: Mapping[str, Any], name: str) -> str | None:
    """Explains why these weights cannot be trained on; None if they can.

    A quantised checkpoint cannot be quantised again to NF4, and transformers refuses or converts it in as many ways as
    there are methods. All are refused alike, before anything is downloaded or read.
    """
    nested = config.get("text_config")
    for part in (config, nested if isinstance(nested, Mapping) else {}):
        found = part.get("quantization_config")
        if isinstance(found, Mapping) and found:
            method = str(found.get("quant_method") or "an unknown method")
            form = _WORDS.get(method) or f"{_bits(found)} ({method})"
            return f"the weights of {name} are published in {form}, and training needs them in 16 bits"
    return None


def _bits(settings: Mapping[str, Any]) -> str:
    if settings.get("load_in_4bit"):
        return "4 bits"
    if settings.get("load_in_8bit"):
        return "8 bits"
    bits = settings.get("bits")
    return f"{bits} bits" if isinstance(bits, int) else "a quantised form"
