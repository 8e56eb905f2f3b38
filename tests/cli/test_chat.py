"""A talk with a real, tiny model and a real adapter that speaks differently."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.command import CommandLine
from tests.tiny_models import make_model

QUESTION = "What colour is the cat?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/acme/tiny, and an adapter on it whose weights are large enough to change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("chat")
    model_dir = make_model(root / "models" / "acme" / "tiny", "qwen3")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(r=4, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.peft_config["default"].base_model_name_or_path = "acme/tiny"
    model.save_pretrained(root / "adapter")
    return root


def test_base_and_adapter_answer_side_by_side_and_the_base_stays_itself(folder: Path) -> None:
    cli = CommandLine(folder, TRAINER_MODELS_DIR=str(folder / "models"), DATABASE_URL="postgresql://me:s3cret@h/x")
    first, again, after = cli.run(
        "chat", "adapter", "--json", "--max-tokens", 12, stdin=f"{QUESTION}\n{QUESTION}\n/new\n{QUESTION}\n"
    ).lines
    assert first["base"] != first["adapter"]
    # The second asks within a conversation, the third from the beginning: the same words as the first.
    assert again != first
    assert after == first


def test_an_adapter_of_another_model_is_refused_in_words(folder: Path) -> None:
    other = folder / "other-adapter"
    shutil.copytree(folder / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"r": 8}))
    said = CommandLine(folder, TRAINER_MODELS_DIR=str(folder / "models")).run("chat", "other-adapter", "-q", QUESTION)
    assert said.status == 1
    assert "The adapter cannot be opened on this model" in said.err


def test_an_adapter_that_is_not_read_whole_does_not_answer(folder: Path) -> None:
    """PEFT warns, where nobody sees it, and answers with random weights in place of the missing ones."""
    from safetensors.torch import load_file, save_file

    part = folder / "part-of-an-adapter"
    shutil.copytree(folder / "adapter", part)
    tensors = load_file(part / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[2:]), part / "adapter_model.safetensors", {"format": "pt"})
    said = CommandLine(folder, TRAINER_MODELS_DIR=str(folder / "models")).run("chat", part.name, "-q", QUESTION)
    assert (said.status, said.out) == (1, "")
    assert "it lacks weights for 2 places of its config" in said.err
