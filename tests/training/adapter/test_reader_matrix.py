"""Adapters that our recipe trained, opened by whatever people open them with: the logits are those of training.

The cells are the table of docs/reference/readers.md, which is written from what is asserted here:
`python -m tests.training.adapter.readers_page`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import training.recipe
from tests.other_libraries import TRANSFORMERS_4, library, python_path
from tests.tiny_models import make_model, write_conversations
from tests.training.adapter import open_with_peft
from tests.training.adapter.readers_page import FAMILIES, FOR_TRANSFORMERS_4, OLD_PEFTS, RAISES, cell
from tests.training.conftest import train
from tests.training.export.llama_cpp import ask_llama_cpp
from training.adapter.readers import peft_floor
from training.distance import distance
from training.export.gguf_adapter import write_gguf_adapter
from training.export.gguf_model import write_gguf_model
from training.export.merge import merge_adapter
from training.export.transformers4 import write_for_transformers4
from training.spec import Hyperparameters, JobSpec

pytestmark = [pytest.mark.system, pytest.mark.together]

# The base model is stored and computed in float32, which keeps 24 bits. Layers of four families multiply in another
# order than training does, and transformers 4 computes each expert by itself.
_ROUNDING = 1e-5
# PEFT before 0.14 says the first, and up to 0.16 the second.
_REFUSALS = ("unexpected keyword argument 'target_parameters'", "Target modules set() not found in the base model")


@dataclass(frozen=True)
class Trained:
    """A base model, the adapter that a job trained on it, and what the job's own model answered at the end."""

    base: Path
    adapter: Path
    logits: torch.Tensor
    before: torch.Tensor

    def assert_same(self, found: torch.Tensor) -> None:
        assert distance(self.before, self.logits) > 0.1
        assert distance(found, self.logits) < _ROUNDING


TrainedOf = Callable[[str], Trained]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainedOf:
    """trained("phi3"): made on first use."""

    @cache
    def make(family: str) -> Trained:
        return _train(family, tmp_path_factory.mktemp(family))

    return make


def _train(family: str, root: Path) -> Trained:
    # As Qwen3-MoE is published; llama.cpp knows no other.
    extra = {"norm_topk_prob": True} if family == "qwen3_moe" else {}
    base = make_model(root / "base", family, **extra)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain.save_pretrained(base)
    _name_experts_as_published(base / "config.json")
    spec = JobSpec(
        job_id="job",
        base_model=f"tiny/{family}",
        model_path=base,
        dataset_path=write_conversations(root / "data.jsonl", 24),
        work_dir=root,
        checkpoint_dir=root / "checkpoints",
        output_dir=root / "adapter",
        compute_type="float32",
        quantize=False,
        hyperparameters=Hyperparameters(lora_rank=4, num_epochs=1, learning_rate=5e-3, sample_prompts=()),
    )
    logits: list[torch.Tensor] = []
    save = training.recipe.save_adapter

    def note_and_save(spec: Any, model: Any, *others: Any) -> Any:
        logits.append(_logits(model))
        return save(spec, model, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.recipe, "draw_chart", lambda _journal, path, title: path.write_bytes(b"\x89PNG"))
        patch.setattr(training.recipe, "save_adapter", note_and_save)
        train(spec)
    return Trained(base, spec.output_dir, logits[0], _logits(plain))


def _name_experts_as_published(config: Path) -> None:
    """Transformers 5 writes this number by another name than the hub has it, which transformers 4 does not know."""
    values = json.loads(config.read_text())
    if values["model_type"] == "qwen3_moe":
        config.write_text(json.dumps({**values, "num_experts": values["num_local_experts"]}))


def for_transformers_4(made: Trained, root: Path) -> Trained:
    assert write_for_transformers4(made.adapter, root / "rewritten")
    return replace(made, adapter=root / "rewritten")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor(open_with_peft.probe())).logits.float()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_current_peft(family: str, trained: TrainedOf) -> None:
    made = trained(family)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32), made.adapter
    )
    loaded = {path.replace(".default", "") for path, _ in model.named_parameters() if "lora_" in path}
    assert loaded == load_file(made.adapter / "adapter_model.safetensors").keys()
    made.assert_same(_logits(model))


def test_what_is_rewritten_for_transformers_4_is_refused_by_current_peft(trained: TrainedOf, tmp_path: Path) -> None:
    made = for_transformers_4(trained("qwen3_next"), tmp_path)
    with pytest.raises(ValueError, match="does not work with lora_dropout != 0"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base), made.adapter)


@pytest.mark.parametrize("family", [*FAMILIES, FOR_TRANSFORMERS_4])
def test_merged_and_loaded_again(family: str, trained: TrainedOf, tmp_path: Path) -> None:
    made = for_transformers_4(trained("qwen3_next"), tmp_path) if family == FOR_TRANSFORMERS_4 else trained(family)
    merged = merge_adapter(made.base, made.adapter, tmp_path / "merged")
    made.assert_same(_logits(AutoModelForCausalLM.from_pretrained(merged.path, dtype=torch.float32)))


@pytest.mark.parametrize("family", [*FAMILIES, FOR_TRANSFORMERS_4])
def test_llama_cpp(family: str, trained: TrainedOf, tmp_path: Path) -> None:
    made = for_transformers_4(trained("qwen3_next"), tmp_path) if family == FOR_TRANSFORMERS_4 else trained(family)
    write_gguf_model(made.base, tmp_path / "model.gguf", type_="f32")
    write_gguf_adapter(made.base, made.adapter, tmp_path / "lora.gguf")
    words = made.logits.shape[-1]
    answers = ask_llama_cpp(
        tmp_path / "model.gguf", lora=str(tmp_path / "lora.gguf"), prompts=open_with_peft.probe(), words=words
    )
    found = [[answer[str(word)] for word in range(words)] for answer in answers["logprobs"]]
    wanted, before = (logits[:, -1].log_softmax(-1) for logits in (made.logits, made.before))
    # It looks Gemma's GELU up in a table of 16 bits.
    tolerance = 0.01 if family.startswith("gemma") else 5e-4
    assert (torch.tensor(found) - wanted).abs().max() < tolerance
    assert (before - wanted).abs().max() > 20 * tolerance


@pytest.mark.parametrize("peft", OLD_PEFTS)
def test_an_older_peft_with_transformers_4(peft: str, trained: TrainedOf, tmp_path: Path) -> None:
    """One process for all families: importing takes longer than all of them."""
    made = {family: trained(family) for family in FAMILIES}
    made[FOR_TRANSFORMERS_4] = for_transformers_4(made["qwen3_next"], tmp_path)
    request = {
        "into": str(tmp_path),
        "adapters": {name: {"base": str(one.base), "adapter": str(one.adapter)} for name, one in made.items()},
    }
    done = subprocess.run(
        [sys.executable, open_with_peft.__file__],
        input=json.dumps(request),
        env=python_path(library(f"peft=={peft}"), library(*TRANSFORMERS_4)),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    faults = {}
    for family, one in made.items():
        found = answer[family]
        if "error" not in found:
            found["logits"] = load_file(tmp_path / f"{family}.safetensors")["logits"]
        faults[family] = _fault(one, found, cell(family, peft))
    assert {family: fault for family, fault in faults.items() if fault is not None} == {}


def _fault(made: Trained, found: dict[str, Any], said: str) -> str | None:
    """What is otherwise than the table says."""
    error = found.get("error", "")
    if said == RAISES:
        return None if any(words in error for words in _REFUSALS) else f"not refused: {found}"
    if error or found["unlike"] or found["added"]:
        return str(found)
    if (far := distance(found["logits"], made.logits)) >= _ROUNDING:
        return f"its logits are {far} off"
    tokenizer: Any = AutoTokenizer.from_pretrained(made.base)
    prompt = tokenizer(tokenizer.apply_chat_template(open_with_peft.CHAT, tokenize=False)).input_ids
    return None if found["prompt"] == prompt else f"the prompt's tokens are {found['prompt']}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_floor_that_the_card_names_is_where_the_table_begins(family: str, trained: TrainedOf) -> None:
    floor = peft_floor(json.loads((trained(family).adapter / "adapter_config.json").read_text()))
    opens = [peft for peft in OLD_PEFTS if cell(family, peft) != RAISES]
    assert opens[0].rpartition(".")[0] == floor
