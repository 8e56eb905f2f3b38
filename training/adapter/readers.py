"""What an adapter's config asks of PEFT when somebody opens it. Without torch, so that the daemon may ask as well."""

from __future__ import annotations

from collections.abc import Mapping

# The oldest PEFT that our adapters were opened with.
_OLDEST = "0.12"
# What it knows of a LoRA config. It raises for any other key, whatever its value; later versions warn or read it.
KNOWN_KEYS = frozenset((
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern", "revision",
    "target_modules", "task_type", "use_dora", "use_rslora",
))  # fmt: skip
# The keys of a LoRA config that came later, with the first version that opens such an adapter as it was trained.
_SINCE: Mapping[str, str] = {
    # Earlier ones raise "unexpected keyword argument".
    "exclude_modules": "0.14",
    # Earlier ones ignore it. We list all layers there, so that they find none and raise.
    "target_parameters": "0.17",
}


def peft_floor(config: Mapping[str, object]) -> str:
    """Returns the oldest version of PEFT that opens an adapter with this `adapter_config.json` as it was trained."""
    needed = [since for key, since in _SINCE.items() if config.get(key)]
    return max([_OLDEST, *needed], key=lambda version: tuple(map(int, version.split("."))))
