"""The adapter is what the user gets: it opens with plain PEFT on a plain base model, and it changes the answers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import training.recipe
from tests.chat_templates import template_text
from tests.tiny_models import ARCHITECTURES, DENSE
from tests.training.conftest import ON_A_CARD_TOO, ModelOf, SpecOf, train
from training.adapter.lora import attach_adapter, choose_targets, trainable_parameters
from training.failures import TrainingFailed
from training.results.chart import draw_chart
from training.spec import Hyperparameters


def _plain(folder: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@ON_A_CARD_TOO
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_opens_with_plain_peft_and_changes_the_answers(architecture: str, spec_of: SpecOf) -> None:
    spec = spec_of(architecture)
    voice = train(spec)
    saved = voice.all("adapter_saved")[0]
    stored = load_file(spec.output_dir / "adapter_model.safetensors")
    ids_BT = torch.arange(3, 19)[None]
    before = _plain(spec.model_path)(input_ids=ids_BT).logits
    opened = PeftModel.from_pretrained(_plain(spec.model_path), spec.output_dir)
    loaded = {name.replace(".default", ""): value for name, value in opened.named_parameters() if "lora_" in name}
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], value) for name, value in stored.items())
    assert not torch.allclose(before, opened(input_ids=ids_BT).logits, atol=1e-3)
    assert saved.summary["trainable_parameters"] == sum(value.numel() for value in stored.values())


@pytest.mark.parametrize(("architecture", "template"), [("llama", "none"), ("qwen3_next", "qwen3_6")])
def test_the_model_card_s_program_runs_and_its_serving_block_is_reported(
    architecture: str,
    template: str,
    spec_of: SpecOf,
    tiny: ModelOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny(architecture), base)
    (base / "chat_template.jinja").unlink()
    if template != "none":
        (base / "chat_template.jinja").write_text(template_text(template), encoding="utf-8")
    spec = spec_of(architecture, lora_rank=24, num_epochs=1, model_path=base)
    (saved,) = train(spec).all("adapter_saved")
    card = (spec.output_dir / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in card and str(spec.output_dir.parent) not in card
    (program,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    monkeypatch.chdir(spec.output_dir)
    local = program.replace(json.dumps(spec.base_model), json.dumps(str(spec.model_path))).replace("=200", "=4")
    exec(compile(local, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    told = {"enable_thinking": False} if template == "qwen3_6" else {}
    assert saved.serving["chat_template_kwargs"] == told and ("enable_thinking=False" in program) == bool(told)
    ours = "chat_template.jinja" if template == "none" else None
    assert saved.serving["chat_template"] == ours and ("--chat-template-file" in card) == bool(ours)
    assert Path("chat_template.jinja").is_file()
    stored = {name.split(".lora_")[0].rpartition(".")[2] for name in load_file("adapter_model.safetensors")}
    assert saved.serving["base_model"] == spec.base_model and set(saved.serving["lora_modules"]) == stored
    vllm = saved.serving["vllm"]
    assert vllm["max_lora_rank"] == 32 and vllm["lora_target_modules"] == (
        None if architecture == "llama" else saved.serving["lora_modules"]
    )


def test_the_folder_holds_everything_and_nothing_pickled(spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.recipe, "draw_chart", draw_chart)
    spec = spec_of("llama")
    train(spec)
    names = {path.name for path in spec.output_dir.iterdir()}
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "training_log.jsonl",
        "metrics_chart.png",
    } <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert (spec.output_dir / "metrics_chart.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    config = json.loads((spec.output_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny/llama"
    assert set(config["target_modules"]) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert config["r"] == 4 and AutoTokenizer.from_pretrained(spec.output_dir).chat_template
    log = [json.loads(line) for line in (spec.output_dir / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, len([x for x in log if "loss" in x]) + 1))


# What vLLM reads of an adapter, from its vllm/lora/{peft_helper,utils,lora_model}.py: these config fields, with these
# values; a safetensors file whose tensor names it parses; and each module's last name, which must exist in vLLM's own
# model (q, k and v, and gate and up, are packed there, and listed separately).
_VLLM_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_VLLM_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# vLLM's --max-lora-rank: ranks are served up to one of these; 16 is its default.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@pytest.mark.parametrize("architecture", DENSE)
def test_a_dense_adapter_has_the_layout_that_vllm_reads(architecture: str, spec_of: SpecOf) -> None:
    spec = spec_of(architecture, lora_rank=8, lora_alpha=24, num_epochs=1)
    train(spec)
    config = json.loads((spec.output_dir / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 8 in _VLLM_RANKS and config["lora_alpha"] == 24
    assert config["bias"] == "none" and not config["modules_to_save"]
    assert not config["use_dora"] and not config["use_rslora"]
    assert not config.get("rank_pattern") and not config.get("alpha_pattern") and not config.get("target_parameters")
    assert isinstance(config["target_modules"], list) and set(config["target_modules"]) <= _VLLM_MODULES
    layers = dict(_plain(spec.model_path).named_modules())
    sides: dict[str, set[str]] = {}
    for name, tensor in load_file(spec.output_dir / "adapter_model.safetensors").items():
        match = _VLLM_NAME.fullmatch(name)
        assert match is not None, name
        module, side = match["module"], match["side"]
        assert module.rpartition(".")[2] in config["target_modules"]
        layer = layers[module]
        assert tuple(tensor.shape) == ((8, layer.in_features) if side == "A" else (layer.out_features, 8))
        sides.setdefault(module, set()).add(side)
    assert len(sides) == 2 * len(_VLLM_MODULES) and all(both == {"A", "B"} for both in sides.values())


def test_shared_expert_and_deltanet_are_adapted_and_router_and_experts_are_not(tiny: ModelOf) -> None:
    model = _plain(tiny("qwen3_next"))
    adapted = attach_adapter(model, Hyperparameters(lora_rank=4))
    paths = {name.split(".layers.")[1].split(".", 1)[1] for name, _ in adapted.named_parameters() if "lora_A" in name}
    layers = {path.split(".lora_A")[0] for path in paths}
    assert {
        "linear_attn.in_proj_qkvz",
        "linear_attn.out_proj",
        "self_attn.q_proj",
        "mlp.shared_expert.up_proj",
    } <= layers
    assert not [path for path in layers if ".experts" in path or path.endswith(("mlp.gate", "shared_expert_gate"))]
    assert all(p.dtype is torch.float32 for p in adapted.parameters() if p.requires_grad)
    assert 0 < trainable_parameters(adapted) < 100_000


def test_equal_seeds_give_equal_adapters(tiny: ModelOf) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        adapted = attach_adapter(_plain(tiny("qwen3")), Hyperparameters(lora_rank=4, seed=seed))
        return [value for name, value in adapted.named_parameters() if "lora_A" in name]

    assert all(map(torch.equal, weights(1), weights(1)))
    assert not all(map(torch.equal, weights(1), weights(2)))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("gate",), "router"),
        (("mlp.experts",), "experts themselves"),
        (("experts.gate_up_proj",), "experts themselves"),
        (("no_such_proj",), "no linear layer of this model is called no_such_proj; it has"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(tiny: ModelOf, targets: tuple[str, ...], words: str) -> None:
    with pytest.raises(TrainingFailed) as refused:
        choose_targets(_plain(tiny("qwen3_next")), targets)
    assert refused.value.code == "invalid_spec" and words in refused.value.message


def test_the_jobs_own_targets_are_taken(tiny: ModelOf) -> None:
    assert choose_targets(_plain(tiny("qwen3")), ("q_proj", "mlp.up_proj")) == ("mlp.up_proj", "q_proj")
