"""GGUF files of whole models and of adapters, read back by other code than ours: gguf's reader and transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import training.export.gguf_file
import training.export.gguf_model
from tests.tiny_models import DENSE, MIXTURES, OTHER_FAMILIES, make_model, make_tokenizer
from training.events import ErrorCode
from training.export.gguf_adapter import write_gguf_adapter
from training.export.gguf_model import write_gguf_model
from training.failures import TrainingFailed

# llama.cpp computes no other: see the refusals below.
NORMALISED = {"norm_topk_prob": True}
# What transformers reads from GGUF as well. It knows neither Qwen3-Next nor Mixtral there.
READ_BY_TRANSFORMERS = (*DENSE, *OTHER_FAMILIES, "qwen3_moe")

MakeFamily = Callable[..., Path]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> MakeFamily:
    """family("phi3") is the folder of that model, made on first use."""
    root = tmp_path_factory.mktemp("families")

    def make(architecture: str) -> Path:
        extra = NORMALISED if architecture == "qwen3_moe" else {}
        folder = root / architecture
        return folder if folder.is_dir() else make_model(folder, architecture, initializer_range=0.2, **extra)

    return make


def tensors_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a GGUF file in float32, in the order of dimensions that torch uses."""
    return {
        tensor.name: np.array(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(tuple(reversed(tensor.shape)))
        for tensor in gguf.GGUFReader(path).tensors
    }


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("architecture", READ_BY_TRANSFORMERS)
def test_transformers_reads_every_tensor_back_as_it_was(architecture: str, family: MakeFamily, tmp_path: Path) -> None:
    folder = family(architecture)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # By another name: transformers takes a model with "mistral" in its name for an architecture that there is not.
    written = write_gguf_model(folder, tmp_path / "model.gguf", name="some model")

    # With the configuration, since transformers ignores the size of heads and experts that the file states.
    config = AutoConfig.from_pretrained(folder)
    config.model_type = "llama" if architecture == "mistral" else config.model_type
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32)

    assert written.type == "bf16"
    found = loaded.state_dict()
    assert set(found) == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_qwen3_nexts_queries_keys_values_and_gates_lie_apart(family: MakeFamily, tmp_path: Path) -> None:
    folder = family("qwen3_next")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = model.model.layers[0].linear_attn
    states = torch.randn(1, 5, model.config.hidden_size)
    with torch.no_grad():
        q, k, v, z, _, _ = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(states), layer.in_proj_ba(states))
    mixed = torch.cat([part.reshape(1, 5, -1) for part in (q, k, v)], dim=-1)

    write_gguf_model(folder, tmp_path / "model.gguf", type_="f32")

    found = tensors_of(tmp_path / "model.gguf")
    assert torch.allclose(states @ torch.from_numpy(found["blk.0.attn_qkv.weight"]).T, mixed, atol=1e-5)
    gates = states @ torch.from_numpy(found["blk.0.attn_gate.weight"]).T
    assert torch.allclose(gates, z.reshape(1, 5, -1), atol=1e-5)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.linear_attn"
    assert np.allclose(found["blk.0.ssm_a"], -torch.exp(weights[f"{name}.A_log"].float()).numpy())
    assert np.array_equal(found["blk.0.ssm_dt.bias"], weights[f"{name}.dt_bias"].float().numpy())
    assert np.array_equal(found["blk.0.ssm_norm.weight"], weights[f"{name}.norm.weight"].float().numpy())
    assert np.array_equal(found["blk.0.ssm_conv1d.weight"], weights[f"{name}.conv1d.weight"].squeeze(1).float().numpy())
    assert np.array_equal(found["output_norm.weight"], weights["model.norm.weight"].float().numpy() + 1)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_lie_in_one_tensor_in_their_order(architecture: str, family: MakeFamily, tmp_path: Path) -> None:
    folder = family(architecture)
    weights = load_file(folder / "model.safetensors")

    write_gguf_model(folder, tmp_path / "model.gguf")

    found = tensors_of(tmp_path / "model.gguf")
    published, theirs = (
        ("block_sparse_moe", ("w1", "w2", "w3"))
        if architecture == "mixtral"
        else ("mlp", ("gate_proj", "down_proj", "up_proj"))
    )
    for ours, name in zip(("gate", "down", "up"), theirs, strict=True):
        stacked = torch.stack(
            [weights[f"model.layers.1.{published}.experts.{expert}.{name}.weight"] for expert in range(8)]
        )
        assert np.array_equal(found[f"blk.1.ffn_{ours}_exps.weight"], stacked.float().numpy())


def test_experts_published_in_one_tensor_are_written_the_same(family: MakeFamily, tmp_path: Path) -> None:
    folder = family("qwen3_moe")
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        experts = {
            part: torch.stack([weights.pop(f"{name}.{expert}.{part}.weight") for expert in range(8)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        weights[f"{name}.gate_up_proj"] = torch.cat([experts["gate_proj"], experts["up_proj"]], dim=1)
        weights[f"{name}.down_proj"] = experts["down_proj"]
    fused = _copy_with(folder, tmp_path / "fused", weights)

    write_gguf_model(folder, tmp_path / "single.gguf")
    write_gguf_model(fused, tmp_path / "fused.gguf")

    single, found = tensors_of(tmp_path / "single.gguf"), tensors_of(tmp_path / "fused.gguf")
    assert set(single) == set(found)
    assert all(np.array_equal(single[name], found[name]) for name in single)


@pytest.mark.parametrize("architecture", [*DENSE, *OTHER_FAMILIES, *MIXTURES])
def test_a_gguf_lora_changes_the_base_as_merging_does(architecture: str, family: MakeFamily, tmp_path: Path) -> None:
    """alpha / rank · B·A on the base's GGUF is the GGUF of the merged model, for every adapted tensor."""
    folder = family(architecture)
    adapter, merged = _adapter_and_merged(folder, tmp_path, alpha=24, rank=4)
    for source, name in ((folder, "base"), (merged, "merged")):
        write_gguf_model(source, tmp_path / f"{name}.gguf", type_="f32")

    written = write_gguf_adapter(folder, adapter, tmp_path / "lora.gguf")

    base, after = tensors_of(tmp_path / "base.gguf"), tensors_of(tmp_path / "merged.gguf")
    lora, fields = tensors_of(tmp_path / "lora.gguf"), fields_of(tmp_path / "lora.gguf")
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 24.0)
    assert fields["general.architecture"] == fields_of(tmp_path / "base.gguf")["general.architecture"]
    changed = {name for name in base if not np.array_equal(base[name], after[name])}
    assert changed and {name.removesuffix(".lora_a") for name in lora if name.endswith("a")} == changed
    assert written.tensors == len(lora) == 2 * len(changed)
    for name in changed:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        assert np.allclose(base[name] + fields["adapter.lora.alpha"] / a.shape[0] * (b @ a), after[name], atol=1e-4), (
            name
        )


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"use_rslora": True}, 2.0),
        ({"alpha_pattern": {"q_proj": 4}}, 0.5),
        ({"alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 24}}, 3.0),
        ({"alpha_pattern": {"up_proj|q_proj": 4}}, 0.5),
    ],
)
def test_another_scale_than_alpha_by_rank_goes_into_b(
    settings: dict[str, Any], factor: float, family: MakeFamily, tmp_path: Path
) -> None:
    adapter, _ = _adapter_and_merged(family("qwen3"), tmp_path, alpha=8, rank=4)
    plain, other = tmp_path / "plain.gguf", tmp_path / "other.gguf"
    write_gguf_adapter(family("qwen3"), adapter, plain)
    _change(adapter / "adapter_config.json", settings)

    write_gguf_adapter(family("qwen3"), adapter, other)

    name = "blk.0.attn_q.weight.lora_b"
    assert np.allclose(tensors_of(other)[name], factor * tensors_of(plain)[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa"},
        {"alora_invocation_tokens": [5]},
    ],
)
def test_what_llama_cpp_would_leave_out_is_refused(
    settings: dict[str, Any], family: MakeFamily, tmp_path: Path
) -> None:
    adapter, _ = _adapter_and_merged(family("qwen3"), tmp_path, alpha=8, rank=4)
    _change(adapter / "adapter_config.json", settings)

    with pytest.raises(TrainingFailed) as refusal:
        write_gguf_adapter(family("qwen3"), adapter, tmp_path / "lora.gguf")

    assert refusal.value.code == ErrorCode.INVALID_SPEC
    assert "LoRA" in refusal.value.message
    assert not (tmp_path / "lora.gguf").exists()


@pytest.mark.parametrize(
    ("architecture", "settings", "says"),
    [
        ("qwen3", {"architectures": ["FalconForCausalLM"]}, "a GGUF of FalconForCausalLM cannot be written here"),
        ("qwen3_moe", {"norm_topk_prob": False}, "always normalises the weights"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "some layers of this model have none"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "scales this model's attention by 32"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "full attention in every 6th layer"),
        ("qwen3_next", {"linear_value_head_dim": 32}, "keys and values to be of one size"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "does not know the rotary positions 'dynamic'",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    architecture: str, settings: dict[str, Any], says: str, family: MakeFamily, tmp_path: Path
) -> None:
    folder = _copy_with(family(architecture), tmp_path / "model", load_file(family(architecture) / "model.safetensors"))
    _change(folder / "config.json", settings)

    with pytest.raises(TrainingFailed) as refusal:
        write_gguf_model(folder, tmp_path / "model.gguf")

    assert says in refusal.value.message
    assert "convert_hf_to_gguf.py" in refusal.value.hint
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize(
    ("architecture", "settings", "lost"),
    [
        ("mistral", {"sliding_window": 512}, 512),
        ("mistral", {"sliding_window": None}, None),
        ("phi3", {"sliding_window": 512}, 512),
        ("phi3", {"sliding_window": 262_144}, None),
        ("qwen3", {"sliding_window": 512, "use_sliding_window": False}, None),
        ("qwen3", {"sliding_window": 512, "use_sliding_window": True}, 512),
        ("gemma3", {"sliding_window": 512}, None),
    ],
)
def test_a_window_that_llama_cpp_leaves_out_is_told(
    architecture: str, settings: dict[str, Any], lost: int | None, family: MakeFamily, tmp_path: Path
) -> None:
    folder = _copy_with(family(architecture), tmp_path / "model", load_file(family(architecture) / "model.safetensors"))
    _change(folder / "config.json", settings)

    assert write_gguf_model(folder, tmp_path / "model.gguf").lost_window == lost


def test_of_a_model_that_sees_the_language_model_is_written(family: MakeFamily, tmp_path: Path) -> None:
    folder = family("gemma3")
    weights = load_file(folder / "model.safetensors")
    seeing = {name.replace("model.", "language_model.model.", 1): tensor for name, tensor in weights.items()}
    seeing["vision_tower.vision_model.embeddings.position_embedding.weight"] = torch.zeros(4, 32)
    seeing["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.zeros(32)
    whole = _copy_with(folder, tmp_path / "whole", seeing)
    config = json.loads((folder / "config.json").read_text())
    (whole / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Gemma3ForConditionalGeneration"],
                "model_type": "gemma3",
                "text_config": config,
                "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            }
        )
    )

    write_gguf_model(folder, tmp_path / "text.gguf")
    write_gguf_model(whole, tmp_path / "whole.gguf")

    text, found = tensors_of(tmp_path / "text.gguf"), tensors_of(tmp_path / "whole.gguf")
    assert set(text) == set(found)
    assert all(np.array_equal(text[name], found[name]) for name in text)
    assert fields_of(tmp_path / "whole.gguf")["gemma3.attention.sliding_window"] == 16


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_weights_are_written_in_the_type_asked_for(kind: str, family: MakeFamily, tmp_path: Path) -> None:
    folder = family("qwen3")
    weight = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"].float().numpy()

    write_gguf_model(folder, tmp_path / "model.gguf", type_=kind)

    types = {
        tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    found = tensors_of(tmp_path / "model.gguf")
    assert types["blk.0.ffn_down.weight"] == types["token_embd.weight"] == kind
    assert types["output_norm.weight"] == types["blk.0.attn_q_norm.weight"] == "f32"
    assert np.abs(found["blk.0.ffn_down.weight"] - weight).max() <= (0.01 if kind == "q8_0" else 0.0005)


def test_an_unknown_type_is_refused_with_those_there_are(family: MakeFamily, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed) as refusal:
        write_gguf_model(family("qwen3"), tmp_path / "model.gguf", type_="q4_k_m")

    assert "q4_k_m" in refusal.value.message
    assert "f32, f16, bf16, q8_0; llama.cpp's llama-quantize" in refusal.value.hint


def test_a_large_tensor_is_written_in_pieces(
    family: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    for kind in ("bf16", "q8_0"):
        write_gguf_model(family("qwen3_next"), tmp_path / f"{kind}.gguf", type_=kind)
    monkeypatch.setattr(training.export.gguf_model, "_PIECE_VALUES", 640)

    for kind in ("bf16", "q8_0"):
        told.clear()
        write_gguf_model(
            family("qwen3_next"),
            tmp_path / f"{kind}-pieces.gguf",
            type_=kind,
            name=kind,
            on_bytes=lambda *bytes_: told.append(bytes_),
        )
        whole, pieces = tensors_of(tmp_path / f"{kind}.gguf"), tensors_of(tmp_path / f"{kind}-pieces.gguf")
        assert all(np.array_equal(whole[name], pieces[name]) for name in whole)
        assert len(told) > 1000
        assert told[-1][0] == told[-1][1]


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    family: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.export.gguf_file.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=2**26))

    with pytest.raises(TrainingFailed) as refusal:
        write_gguf_model(family("qwen3"), tmp_path / "model.gguf")

    assert refusal.value.code == ErrorCode.DISK_FULL
    assert "takes 0.0 GiB, and 0.1 GiB are free there" in refusal.value.message
    assert not list(tmp_path.iterdir())


def test_without_the_package_gguf_it_says_what_to_install(
    family: MakeFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)

    with pytest.raises(TrainingFailed) as refusal:
        write_gguf_model(family("qwen3"), tmp_path / "model.gguf")

    assert refusal.value.hint == 'install it: pip install "brightrun-trainer[gguf]"'


def test_a_model_without_one_of_its_experts_is_incomplete(family: MakeFamily, tmp_path: Path) -> None:
    weights = load_file(family("qwen3_moe") / "model.safetensors")
    del weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    folder = _copy_with(family("qwen3_moe"), tmp_path / "model", weights)

    with pytest.raises(TrainingFailed) as refusal:
        write_gguf_model(folder, tmp_path / "model.gguf")

    assert refusal.value.code == ErrorCode.MODEL_INCOMPLETE
    assert "blk.1.ffn_up_exps.weight is made of 8 tensors, and the folder holds 7" in refusal.value.message


@pytest.mark.parametrize(
    ("name", "words", "rstrip", "written"),
    [
        ("microsoft/Phi-3-mini", (), False, "microsoft/Phi 3-mini"),
        ("phi3_test", (), False, "phi 3_test"),
        ("my model", ("<unk>", "<s>", "</s>"), True, "my model (phi-3)"),
        ("Phi-3.5", ("<unk>", "<s>", "</s>"), True, "Phi-3.5"),
    ],
)
def test_the_name_says_phi_3_of_tokenizers_that_drop_spaces_after_special_tokens(
    name: str, words: tuple[str, ...], rstrip: bool, written: str, tmp_path: Path
) -> None:
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(word, rstrip=rstrip, special=True) for word in words]}
    )

    assert training.export.gguf_model._name_for(name, tokenizer) == written


def _adapter_and_merged(folder: Path, tmp_path: Path, *, alpha: int, rank: int) -> tuple[Path, Path]:
    """Writes an adapter of random values for the layers that training adapts by default, and the merged model."""
    from training.files.module_names import DEFAULT_TARGETS, may_be_adapted

    weights, halves = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(5)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in DEFAULT_TARGETS or not may_be_adapted(name):
            continue
        a = torch.randn(rank, weight.shape[1], generator=generator)
        b = torch.randn(weight.shape[0], rank, generator=generator)
        halves |= {f"base_model.model.{module}.lora_{half}.weight": value for half, value in (("A", a), ("B", b))}
        weights[name] = weight.float() + alpha / rank * (b @ a)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(halves, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "base_model_name_or_path": "acme/one",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter, _copy_with(folder, tmp_path / "merged", weights)


def _copy_with(folder: Path, target: Path, weights: dict[str, torch.Tensor]) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    save_file(weights, target / "model.safetensors")
    return target


def _change(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
