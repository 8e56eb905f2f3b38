"""What is decided about real models before their weights are read: every family's config, at full width, in 4 layers.

Their checkpoints are the headers of weight files, named and shaped as on the hub.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from daemon.base_model.upload_size import BESIDE_BYTES, expected_adapter_bytes
from tests.chat_templates import tokenizer_of
from tests.real_shapes import (
    REAL_SHAPES,
    WITHOUT_A_CLASS,
    Stored,
    config_of,
    published_tensors,
    skeleton,
    write_checkpoint,
)
from tests.training.conftest import RecordedEvents
from training.adapter.lora import attach_adapter, trainable_parameters
from training.adapter.openable_config import openable_config
from training.adapter.readers import peft_floor
from training.base.architecture import architecture_of
from training.base.rehearsal import rehearse_loading
from training.data.chat_template import ChatTemplate
from training.data.formats.conversation import Conversation, Turn
from training.failures import TrainingFailed
from training.files.adapter_size import adapter_parameters
from training.files.model_folder import open_model_folder
from training.files.module_names import UNQUANTISED_MODULES
from training.preflight.estimate import NF4_BYTES, model_bytes
from training.quantization.experts import EXPERTS_FUNCTION, Nf4Config, Nf4Quantizer
from training.recipe import prepare
from training.spec import Hyperparameters, JobSpec

LAYERS = 4
RANK = 16
_16_BITS = "choose a copy of this model in 16 bits (BF16); its 4-bit weights are made here, while it is loaded"
# Why a model is refused as the hub has it, and what to do.
REFUSED = {
    "openai/gpt-oss-20b": ("published in 4 bits (MXFP4), and training needs them in 16 bits", _16_BITS),
    "deepseek-ai/DeepSeek-V3": ("published in 8 bits (FP8), and training needs them in 16 bits", _16_BITS),
    "moonshotai/Kimi-K2-Instruct": ("published in 8 bits (FP8), and training needs them in 16 bits", _16_BITS),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (
        "did not become 4-bit (8.0534 billion parameters, first model.layers.0.feed_forward.experts.gate_up_proj)",
        "choose another base model, or report this architecture to the operator",
    ),
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": (
        "of the type mistral3, which transformers does not load as a causal language model: its language model cannot "
        "be trained by itself",
        "choose a text-only model, of the same family perhaps",
    ),
}
ACCEPTED = tuple(name for name in REAL_SHAPES if name not in REFUSED)
# Those that others publish in 16 bits as well.
LOADABLE = (*ACCEPTED, "openai/gpt-oss-20b", "deepseek-ai/DeepSeek-V3")

_ATTENTION, _FEED_FORWARD = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
_ALL_SEVEN = _ATTENTION | _FEED_FORWARD
TARGETS = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": _ALL_SEVEN | {"in_proj_qkvz", "out_proj"},
    "Qwen/Qwen3-30B-A3B": _ATTENTION,
    "Qwen/Qwen3.5-9B": _ALL_SEVEN | {"in_proj_qkv", "in_proj_z", "out_proj"},
    "Qwen/Qwen3.5-397B-A17B": _ALL_SEVEN | {"in_proj_qkv", "in_proj_z", "out_proj"},
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _ATTENTION,
    "microsoft/phi-4": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "openai/gpt-oss-20b": _ATTENTION,
    # Not kv_b_proj, which servers of latent attention multiply into other weights.
    "deepseek-ai/DeepSeek-V3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"} | _FEED_FORWARD,
}
READ_BY = ("target_modules", "target_parameters")
# The parts beside experts that have layers of the same names.
BESIDE_EXPERTS = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("shared_expert",),
    "Qwen/Qwen3.5-397B-A17B": ("shared_expert",),
    "deepseek-ai/DeepSeek-V3": ("mlp", "shared_experts"),
    "zai-org/GLM-4.5-Air": ("mlp", "shared_experts"),
}
# The oldest PEFT. A pattern keeps Gemma's vision tower out.
READABLE_FROM = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "0.17",
    "deepseek-ai/DeepSeek-V3": "0.17",
    "zai-org/GLM-4.5-Air": "0.17",
    "google/gemma-3-12b-it": "0.14",
}
# Matrices that stay in 16 bits, by the end of their names: embeddings and heads; routers; what decides how much a layer
# remembers; convolutions; biases and the like, one row for each expert. Of what sees, whatever is no linear layer.
_EDGES = {"embed_tokens.weight", "lm_head.weight"}
_DELTA_NET = {"conv1d.weight"}
KEPT = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": _EDGES | _DELTA_NET | {"in_proj_ba.weight", "gate.weight"}
    | {"shared_expert_gate.weight"},
    "Qwen/Qwen3-30B-A3B": _EDGES | {"gate.weight"},
    "Qwen/Qwen3.5-9B": _EDGES | _DELTA_NET | {"in_proj_a.weight", "in_proj_b.weight"},
    "Qwen/Qwen3.5-397B-A17B": _EDGES | _DELTA_NET | {"in_proj_a.weight", "in_proj_b.weight", "gate.weight"}
    | {"shared_expert_gate.weight"},
    "mistralai/Mixtral-8x7B-Instruct-v0.1": _EDGES | {"gate.weight"},
    "google/gemma-3-12b-it": {"embed_tokens.weight", "patch_embedding.weight", "position_embedding.weight"}
    | {"multi_modal_projector.mm_input_projection_weight"},
    "openai/gpt-oss-20b": _EDGES | {"router.weight", "experts.gate_up_proj_bias", "experts.down_proj_bias"},
    "deepseek-ai/DeepSeek-V3": _EDGES | {"gate.weight"},
    "zai-org/GLM-4.5-Air": _EDGES | {"gate.weight"},
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {"embed_tokens.weight"},
}  # fmt: skip
# One tensor of each checkpoint that shows how the family names and cuts its weights.
PUBLISHED = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("model.layers.0.mlp.experts.511.gate_proj.weight", (512, 2048)),
    "Qwen/Qwen3-30B-A3B": ("model.layers.1.mlp.experts.127.down_proj.weight", (2048, 768)),
    "Qwen/Qwen3-8B": ("model.layers.3.self_attn.q_proj.weight", (4096, 4096)),
    "Qwen/Qwen3.5-9B": ("model.language_model.layers.3.self_attn.q_proj.weight", (8192, 4096)),
    "Qwen/Qwen3.5-397B-A17B": ("model.language_model.layers.0.mlp.experts.gate_up_proj", (512, 2048, 4096)),
    "meta-llama/Llama-3.1-8B-Instruct": ("model.layers.0.self_attn.k_proj.weight", (1024, 4096)),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (
        "language_model.model.layers.0.feed_forward.experts.gate_up_proj", (16, 5120, 16384),
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": ("model.layers.0.mlp.down_proj.weight", (4096, 14336)),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("model.layers.0.block_sparse_moe.experts.7.w2.weight", (4096, 14336)),
    "google/gemma-3-12b-it": ("language_model.model.layers.0.self_attn.q_proj.weight", (4096, 3840)),
    "microsoft/phi-4": ("model.layers.0.self_attn.qkv_proj.weight", (7680, 5120)),
    "openai/gpt-oss-20b": ("model.layers.0.mlp.experts.gate_up_proj_blocks", (32, 5760, 90, 16)),
    "deepseek-ai/DeepSeek-V3": ("model.layers.3.mlp.experts.0.gate_proj.weight_scale_inv", (16, 56)),
    "zai-org/GLM-4.5-Air": ("model.layers.1.mlp.experts.127.up_proj.weight", (1408, 4096)),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("model.layers.0.mlp.up_proj.weight", (8192, 2048)),
}  # fmt: skip
READS = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 262144, "Qwen/Qwen3-30B-A3B": 40960, "Qwen/Qwen3-8B": 40960,
    "Qwen/Qwen3.5-9B": 262144, "Qwen/Qwen3.5-397B-A17B": 262144, "meta-llama/Llama-3.1-8B-Instruct": 131072,
    "mistralai/Mistral-7B-Instruct-v0.3": 32768, "mistralai/Mixtral-8x7B-Instruct-v0.1": 32768,
    "google/gemma-3-12b-it": 131072, "microsoft/phi-4": 16384, "openai/gpt-oss-20b": 131072,
    "deepseek-ai/DeepSeek-V3": 163840, "zai-org/GLM-4.5-Air": 131072, "HuggingFaceTB/SmolLM2-1.7B-Instruct": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class Real:
    """A real model without its weights: its checkpoint's headers on disk, and itself on the meta device."""

    name: str
    folder: Path
    spec: JobSpec

    @property
    def model(self) -> Any:
        return skeleton(self.name, LAYERS)


RealOf = Callable[[str], Real]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealOf:
    """real(name): the model with its checkpoint in 16 bits, written once."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(name: str) -> Real:
        tensors = published_tensors(name, LAYERS, in_16_bits=True)
        folder = write_checkpoint(root / name, config_of(name, LAYERS, in_16_bits=True), tensors)
        return Real(name, folder, spec_for(name, folder))

    return make


def spec_for(name: str, folder: Path, **chosen: Any) -> JobSpec:
    return JobSpec(
        job_id="job",
        base_model=name,
        model_path=folder,
        dataset_path=folder / "data.jsonl",
        work_dir=folder,
        checkpoint_dir=folder,
        output_dir=folder,
        compute_type="bfloat16",
        hyperparameters=Hyperparameters.model_validate({"lora_rank": RANK, **chosen}),
    )


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_from_headers_with_what_to_do(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config_of(name, LAYERS), published_tensors(name, LAYERS))
    message, hint = REFUSED[name]
    with pytest.raises(TrainingFailed) as refused:
        rehearse_loading(spec_for(name, folder), open_model_folder(folder, name))
    assert refused.value.code == "model_unsupported" and not refused.value.transient
    assert message in refused.value.message and name.split("/")[1].partition("-")[0] in refused.value.message
    assert refused.value.hint == hint


@pytest.mark.parametrize("name", LOADABLE)
def test_what_can_be_trained_is_accepted_from_headers(name: str, real: RealOf) -> None:
    found = real(name)
    rehearsal = rehearse_loading(found.spec, open_model_folder(found.folder, name))
    assert rehearsal.architecture.context_length == READS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_checkpoints_are_named_and_cut_as_on_the_hub(name: str) -> None:
    tensor, shape = PUBLISHED[name]
    assert published_tensors(name, LAYERS)[tensor].shape == shape


@pytest.mark.parametrize("name", LOADABLE)
def test_linear_layers_and_experts_are_packed_and_the_rest_is_kept_and_both_are_estimated(
    name: str, real: RealOf
) -> None:
    found = real(name)
    packed, kept = _after_loading(name)
    matrices = {".".join(path.split(".")[-2:]) for path, shape in kept.items() if len(shape) > 1}
    assert matrices == KEPT.get(name, _EDGES)
    counted = sum(map(math.prod, packed.values())) * NF4_BYTES + 2 * sum(map(math.prod, kept.values()))
    estimated = model_bytes(open_model_folder(found.folder, name), quantize=True, compute_type="bfloat16")
    # Of Qwen3.5 the vision tower is published with the rest and not loaded: 0.4 billion parameters.
    tower = sum(math.prod(t.shape) for path, t in published_tensors(name, LAYERS).items() if ".visual." in path)
    assert estimated - tower * NF4_BYTES == pytest.approx(counted, rel=1e-3)


def _after_loading(name: str) -> tuple[dict[str, torch.Size], dict[str, torch.Size]]:
    """Asks the quantizer about each weight: the shapes of those it packs, and of those it keeps."""
    model = skeleton(name, LAYERS, experts_implementation=EXPERTS_FUNCTION)
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()}
    quantizer = Nf4Quantizer(Nf4Config(torch.bfloat16, list(UNQUANTISED_MODULES)), pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": "meta"})
    packed = {path: shape for path, shape in shapes.items() if quantizer.param_needs_quantization(model, path)}
    return packed, {path: shape for path, shape in shapes.items() if path not in packed}


@pytest.mark.parametrize("name", LOADABLE)
def test_the_adapter_is_on_the_language_model_and_as_large_as_its_headers_say(name: str, real: RealOf) -> None:
    found = real(name)
    adapted = attach_adapter(found.model, found.spec.hyperparameters)
    config = adapted.peft_config["default"]
    assert set(config.target_modules) == TARGETS.get(name, _ALL_SEVEN)
    paths = [path for path, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert paths and not [path for path in paths if {"vision_tower", "experts"} & set(path.split("."))]
    count = trainable_parameters(adapted)
    assert adapter_parameters(open_model_folder(found.folder, name).tensors(), found.spec.hyperparameters) == count
    # What the daemon asks Storage for, before a training: four bytes a number, and what lies beside them.
    assert expected_adapter_bytes(found.folder, found.spec.hyperparameters) == 4 * count + BESIDE_BYTES
    # What its readers are told: where names of the feed-forward are also those of the experts, more of the path.
    written = openable_config(adapted, name, None)
    named = {target.removesuffix(".weight") for key in READ_BY for target in written.get(key) or ()}
    taken = set(config.target_modules)
    beside = {f"{part}.{last}" for part in BESIDE_EXPERTS.get(name, ()) for last in taken & _FEED_FORWARD}
    assert named == (beside | (taken - _FEED_FORWARD) if beside else taken)
    assert peft_floor(written) == READABLE_FROM.get(name, "0.12")


@pytest.mark.system
def test_the_whole_of_the_largest_default_model_is_counted_without_the_layer_that_is_not_loaded(tmp_path: Path) -> None:
    """Qwen3-Next-80B: 79.67 billion parameters, 39.2 GiB in 4 bits."""
    name = "Qwen/Qwen3-Next-80B-A3B-Instruct"
    folder = open_model_folder(write_checkpoint(tmp_path / "model", config_of(name), published_tensors(name)), name)
    assert sum(math.prod(shape) for _, shape in folder.tensors()) == 79_674_391_296
    assert model_bytes(folder, quantize=True, compute_type="bfloat16") / 2**30 == pytest.approx(39.2, abs=0.05)


# -- What loading would find out late ----------------------------------------------------------------------------------


def _rehearse_with(name: str, folder: Path, change: Callable[[dict[str, Stored]], object], **chosen: Any) -> str:
    """Rehearses a checkpoint with other tensors, and returns the code and the words of the refusal."""
    tensors = published_tensors(name, LAYERS)
    change(tensors)
    write_checkpoint(folder, config_of(name, LAYERS), tensors)
    with pytest.raises(TrainingFailed) as refused:
        prepare(spec_for(name, folder, **chosen), RecordedEvents())
    return f"{refused.value.code}: {refused.value.message}"


def test_a_tensor_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    gone = "model.layers.2.mlp.down_proj.weight"
    said = _rehearse_with("Qwen/Qwen3-8B", tmp_path / "model", lambda tensors: tensors.pop(gone))
    assert said.startswith("model_incomplete:") and f"lack 1 tensors and 0 have another shape: {gone}" in said


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    """The library raises a RuntimeError without a name: a job would have been tried again as if we had failed."""
    wrong = "model.layers.2.mlp.down_proj.weight"
    said = _rehearse_with(
        "Qwen/Qwen3-8B", tmp_path / "model", lambda tensors: tensors.update({wrong: Stored((4096, 4096))})
    )
    assert said.startswith("model_incomplete:") and "lack 0 tensors and 1 have another shape" in said and wrong in said


def test_an_expert_that_the_checkpoint_lacks_is_found_out(tmp_path: Path) -> None:
    gone = "model.layers.2.mlp.experts.100.up_proj.weight"
    said = _rehearse_with("Qwen/Qwen3-30B-A3B", tmp_path / "model", lambda tensors: tensors.pop(gone))
    assert said.startswith("model_incomplete:") and f"lack 1 tensors and 0 have another shape: {gone}" in said


@pytest.mark.parametrize(
    ("name", "asked", "said"),
    [
        ("Qwen/Qwen3-8B", "c_attn", "no linear layer of this model is called c_attn; it has"),
        ("zai-org/GLM-4.5-Air", "mlp.gate", "is a router, which is never trained"),
        ("google/gemma-3-12b-it", "fc1", "no linear layer of this model is called fc1; it has down_proj"),
    ],
)
def test_target_modules_are_judged_before_the_model_is_loaded(name: str, asked: str, said: str, tmp_path: Path) -> None:
    refusal = _rehearse_with(name, tmp_path / "model", lambda _: None, target_modules=(asked,))
    assert refusal.startswith("invalid_spec:") and said in refusal


def test_a_model_that_writes_no_text_is_refused_by_what_it_is(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", {"model_type": "vit"}, {"a": Stored((2, 2))})
    with pytest.raises(TrainingFailed, match=r"type vit, which .* models of that type do not write text"):
        architecture_of(open_model_folder(folder, "google/vit"), "google/vit")


def test_a_model_of_code_of_its_own_is_refused_even_in_16_bits(tmp_path: Path) -> None:
    name = "moonshotai/Kimi-K2-Instruct"
    folder = write_checkpoint(tmp_path / "model", config_of(name, in_16_bits=True), {"a": Stored((2, 2))})
    with pytest.raises(TrainingFailed, match=r"type kimi_k2, .* does not know, and code that comes with a model is"):
        architecture_of(open_model_folder(folder, name), name)


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4 bits (bitsandbytes)"),
        ({"quant_method": "gptq", "bits": 8}, "8 bits (gptq)"),
        ({"quant_method": "awq", "bits": 4}, "4 bits (AWQ)"),
        ({"quant_method": "compressed-tensors"}, "a quantised form (compressed-tensors)"),
        ({"bits": 3}, "3 bits (an unknown method)"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_every_quantised_checkpoint_is_refused_by_its_form(
    settings: dict[str, Any], form: str, nested: bool, tmp_path: Path
) -> None:
    name = "Qwen/Qwen3.5-9B" if nested else "Qwen/Qwen3-8B"
    config = config_of(name, LAYERS)
    config.get("text_config", config)["quantization_config"] = settings
    folder = write_checkpoint(tmp_path / "model", config, {"a": Stored((2, 2))})
    with pytest.raises(TrainingFailed) as refused:
        open_model_folder(folder, name)
    assert f"published in {form}, and" in refused.value.message


def test_no_such_setting_is_no_form(tmp_path: Path) -> None:
    config = {**config_of("Qwen/Qwen3-8B", LAYERS), "quantization_config": None}
    open_model_folder(write_checkpoint(tmp_path / "model", config, {"a": Stored((2, 2))}), "m")


# -- Templates ---------------------------------------------------------------------------------------------------------

# The model's template; the token that ends an answer; whether earlier answers look otherwise later, so that each answer
# of a conversation is an example of its own; whether the system text is put into the first request.
TEMPLATES = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": ("qwen3_instruct_2507", "<|im_end|>", False, False),
    "Qwen/Qwen3-30B-A3B": ("qwen3", "<|im_end|>", False, False),
    "Qwen/Qwen3-8B": ("qwen3", "<|im_end|>", False, False),
    "Qwen/Qwen3.5-9B": ("qwen3_5_think", "<|im_end|>", True, False),
    "Qwen/Qwen3.5-397B-A17B": ("qwen3_5_think", "<|im_end|>", True, False),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama3_1", "<|eot_id|>", False, False),
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral-v0.3", "</s>", True, False),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": ("mistral-v0.1", "</s>", False, True),
    "google/gemma-3-12b-it": ("gemma3", "<end_of_turn>", False, False),
    "microsoft/phi-4": ("phi-4", "<|im_end|>", False, False),
    "openai/gpt-oss-20b": ("gptoss", "<|return|>", False, False),
    "deepseek-ai/DeepSeek-V3": ("deepseekv3", "<｜end▁of▁sentence｜>", True, False),
    "zai-org/GLM-4.5-Air": ("glm4moe", "<|user|>", False, False),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("smollm2", "<|im_end|>", False, False),
}


def test_every_family_has_a_template_here() -> None:
    assert set(TEMPLATES) == set(LOADABLE) and set(REFUSED) >= set(WITHOUT_A_CLASS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_familys_template_makes_of_two_answers(name: str) -> None:
    template, end, is_each_alone, is_folded = TEMPLATES[name]
    tokenizer, stops = tokenizer_of(template)
    found = ChatTemplate(tokenizer, stops=stops, today=date(2026, 11, 28))
    said = (("system", "Be brief."), ("user", "One?"), ("assistant", "1."), ("user", "Two?"), ("assistant", "2."))
    turns = tuple(Turn(role, text, role == "assistant") for role, text in said)  # type: ignore[arg-type]
    encoded = found.encode(Conversation(turns, "line 1"))
    assert (found.stop_text, len(encoded.examples) == 2, found.folds_system) == (end, is_each_alone, is_folded)
