"""The adapter's config names the trained layers and no others, in every version of the libraries that read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import ARCHITECTURES, OTHER_FAMILIES
from tests.training.conftest import ModelOf, SpecOf
from training.adapter.lora import attach_adapter
from training.adapter.openable_config import openable_config, shortest_name
from training.adapter.readers import KNOWN_KEYS, peft_floor
from training.base.load import load_base_model
from training.distance import distance
from training.files.model_folder import open_model_folder
from training.spec import Hyperparameters

_ATTENTION, _FEED_FORWARD = ["k_proj", "o_proj", "q_proj", "v_proj"], ["down_proj", "gate_proj", "up_proj"]
_DENSE = sorted([*_ATTENTION, *_FEED_FORWARD])
TARGETS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"), _DENSE),
    "phi3": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    **dict.fromkeys(("qwen3_moe", "mixtral"), _ATTENTION),
    "qwen3_next": [],
}


def _adapted(folder: Any, **chosen: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return attach_adapter(model, Hyperparameters.model_validate({"lora_rank": 4, **chosen}))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHER_FAMILIES])
def test_a_config_has_no_key_that_an_old_peft_refuses_unless_the_model_needs_it(
    architecture: str, tiny: ModelOf
) -> None:
    config = openable_config(_adapted(tiny(architecture)), "acme/base", "abc")
    assert config["target_modules"] == TARGETS[architecture]
    assert (config["base_model_name_or_path"], config["revision"], config["inference_mode"]) == (
        "acme/base",
        "abc",
        True,
    )
    assert config.keys() - KNOWN_KEYS == ({"target_parameters"} if architecture == "qwen3_next" else set())
    assert peft_floor(config) == ("0.17" if architecture == "qwen3_next" else "0.12")


def test_what_old_versions_of_peft_ignore_holds_every_layer_so_that_they_find_none(tiny: ModelOf) -> None:
    config = openable_config(_adapted(tiny("qwen3_next")), "acme/base", None)
    assert config["target_modules"] == [] and config["lora_dropout"] == 0
    assert config["target_parameters"] == [
        "in_proj_qkvz.weight",
        "k_proj.weight",
        "o_proj.weight",
        "out_proj.weight",
        "q_proj.weight",
        "shared_expert.down_proj.weight",
        "shared_expert.gate_proj.weight",
        "shared_expert.up_proj.weight",
        "v_proj.weight",
    ]


def test_an_adapter_that_lists_weights_opens_on_4_bits_as_well_and_comes_off_again(
    tiny: ModelOf, spec_of: SpecOf, tmp_path: Path
) -> None:
    adapted = _adapted(tiny("qwen3_next"))
    for path, parameter in adapted.named_parameters():
        if ".lora_B." in path:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(openable_config(adapted, "acme/base", None)))
    spec = spec_of("qwen3_next", compute_type="float32")
    base = load_base_model(spec, open_model_folder(spec.model_path, spec.base_model))
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        before = base(input_ids=tokens).logits
        opened = PeftModel.from_pretrained(base, tmp_path)
        kinds = {type(module).__name__ for module in opened.modules() if isinstance(module, LoraLayer)}
        stored = load_file(tmp_path / "adapter_model.safetensors")
        loaded = {path.replace(".default", ""): value for path, value in opened.named_parameters() if "lora_" in path}
        assert kinds == {"Linear4bit"} and loaded.keys() == stored.keys()
        assert all(torch.equal(loaded[path], value) for path, value in stored.items())
        assert distance(opened(input_ids=tokens).logits, before) > 0.1
        assert torch.equal(opened.unload()(input_ids=tokens).logits, before)


@pytest.mark.parametrize(("alpha", "written"), [(None, "8"), (24, "24"), (24.0, "24"), (0.5, "0.5")])
def test_a_whole_alpha_is_written_as_a_whole_number(alpha: float | None, written: str, tiny: ModelOf) -> None:
    config = openable_config(_adapted(tiny("llama"), lora_alpha=alpha), "acme/base", None)
    assert json.dumps(config["lora_alpha"]) == written


def test_a_dense_feed_forward_beside_a_mixture_is_told_from_the_experts_of_transformers_4() -> None:
    others = {"model.layers.1.mlp.experts.0.up_proj", "model.layers.1.mlp.experts", "model.layers.0.mlp"}
    assert shortest_name("mlp.up_proj", others) == "mlp.up_proj"
    assert shortest_name("mlp.shared_experts.up_proj", others) == "shared_experts.up_proj"
    assert shortest_name("self_attn.q_proj", others) == "q_proj"


def test_a_layer_that_is_called_like_one_of_another_sense_is_told_from_it_by_a_pattern(tiny: ModelOf) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    seeing = torch.nn.Module()
    seeing.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"self_attn": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})})])  # fmt: skip # noqa: E501
    model.vision_tower = seeing
    config = openable_config(attach_adapter(model, Hyperparameters(lora_rank=4)), "acme/base", None)
    assert config["target_modules"] == _DENSE and "vision_tower" in config["exclude_modules"]
    assert peft_floor(config) == "0.14"
