"""The config of a finished adapter: written so that every reader adapts the layers that were trained, or refuses.

A reader finds the layers by the names in this file. It must therefore match them and nothing else, in the module trees
of transformers 4 and 5 alike, and hold no key that an older PEFT stumbles over.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import peft.utils.transformers_weight_conversion as peft_conversion
from peft import LoraConfig

from training.adapter.readers import KNOWN_KEYS
from training.files.module_names import in_block

if TYPE_CHECKING:
    from peft import PeftModel

# What the projections of single experts are called in transformers 4, where each expert is a module of its own.
_IN_AN_EXPERT = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def openable_config(model: PeftModel, base_model: str, revision: str | None) -> dict[str, Any]:
    """Returns the adapter's `adapter_config.json`, equal for equal runs.

    For mixture models PEFT rewrites gate/up/down_proj in target_modules to the fused experts, where transformers is 5
    or newer. Listed as target_parameters, the weights are left alone, and the stored tensors keep their names. PEFT
    before 0.17 ignores target_parameters and would open a part of the adapter: so all layers are listed there, and it
    finds nothing to adapt and raises. PEFT then computes with the sum of both weights, as a merge does, and allows no
    dropout; an adapter opened for inference has none.
    """
    config: LoraConfig = copy.deepcopy(model.peft_config["default"])
    adapted = list(model.base_model.targeted_module_names)
    others = _others(model, adapted)
    names = {tail: shortest_name(tail, others) for tail in {in_block(path) for path in adapted}}
    if all(names.values()):
        config.exclude_modules = None
    whole = {path for path in adapted if names[in_block(path)] is None}
    exact = {name for name in names.values() if name is not None}
    # Names that others share, where a pattern tells those others apart.
    shared = {path.rpartition(".")[2] for path in whole} if config.exclude_modules else whole
    config.target_modules = exact | shared
    if _is_rewritten(config, model):
        config.target_modules, config.exclude_modules = set(), None
        config.target_parameters = sorted(f"{name}.weight" for name in exact | whole)
        config.lora_dropout = 0.0
    # The model's public name, where PEFT writes a path of this host.
    config.base_model_name_or_path, config.revision = base_model, revision
    config.inference_mode = True
    values = config.to_dict()
    defaults = LoraConfig().to_dict()
    written = {key: value for key, value in values.items() if key in KNOWN_KEYS or value != defaults.get(key)}
    # Ollama reads no other kind of number here.
    if float(config.lora_alpha).is_integer():
        written["lora_alpha"] = int(config.lora_alpha)
    return {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}


def shortest_name(tail: str, others: Collection[str]) -> str | None:
    """Returns the shortest end of a layer's path in its block that ends no path of the others; None if all do."""
    parts = tail.split(".")
    for begin in reversed(range(len(parts))):
        name = ".".join(parts[begin:])
        if not any(other == name or other.endswith(f".{name}") for other in others):
            return name
    return None


def _others(model: PeftModel, adapted: Collection[str]) -> set[str]:
    """The paths of all modules that are not adapted, and of the experts as transformers 4 cuts them."""
    parts_of_layers = tuple(f"{path}." for path in adapted)
    found = set()
    for path, _ in model.get_base_model().named_modules():
        if not path or path in adapted or path.startswith(parts_of_layers):
            continue
        found.add(path)
        found.update(_experts_in(path))
    return found


def _experts_in(path: str) -> Iterator[str]:
    if path.rpartition(".")[2] == "experts":
        yield from (f"{path}.0.{name}" for name in _IN_AN_EXPERT)


def _is_rewritten(config: LoraConfig, model: PeftModel) -> bool:
    """True if PEFT would adapt other layers of this model than the config names."""
    tried = copy.deepcopy(config)
    try:
        peft_conversion.convert_peft_config_for_transformers(tried, model=model.get_base_model(), conversions=None)
    except ValueError:
        # It refuses a part of the names that belong together in a fused expert.
        return True
    return bool(set(tried.target_modules) != set(config.target_modules))
