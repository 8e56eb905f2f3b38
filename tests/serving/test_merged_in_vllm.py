"""A real vLLM serves a merged mixture by the command of its card, and says what base and adapter say."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serving.vllm_server import VllmServer
from tests.tiny_models import make_model
from training.export.merge import merge_adapter
from training.quick_imports import quick_imports

# As the trainer imports it, wherever the tests begin.
with quick_imports():
    from peft import LoraConfig, PeftModel, get_peft_model

PROMPT = list(range(3, 60))
MOST = 4
pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


def test_vllm_serves_the_merged_model_as_the_base_model(tmp_path: Path) -> None:
    # vLLM's attention wants heads of 64, and the hub's key for the number of experts.
    base = make_model(tmp_path / "base", "qwen3_moe", head_dim=64)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_experts": config["num_local_experts"]}))
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    torch.manual_seed(1)
    for path, parameter in model.named_parameters():
        if ".lora_B." in path:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    beside = PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    with torch.no_grad():
        wanted = beside(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).topk(MOST)
    merged = Path(merge_adapter(base, tmp_path / "adapter", tmp_path / "merged").path)

    [command] = re.findall(r"^vllm serve .*$", (merged / "README.md").read_text(), re.MULTILINE)
    words = shlex.split(command)
    asked = {"model": words[2], "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": MOST}
    with VllmServer(words, merged, can_be_told=False) as server:
        url = f"{server.url}/v1/completions"
        answer = httpx.post(url, json={**asked, "return_tokens_as_token_ids": True}, timeout=120).raise_for_status()
    (found,) = answer.json()["choices"][0]["logprobs"]["top_logprobs"]
    ours = {f"token_id:{token}": value for value, token in zip(*map(torch.Tensor.tolist, wanted), strict=True)}
    assert found.keys() == ours.keys()
    # It computes in bfloat16.
    assert found == pytest.approx(ours, abs=0.02)
