"""An adapter for other servers, from the command line: a real merge of a tiny model, and what is said of bad input."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from daemon.base_model.files import Marker
from tests.cli.command import CommandLine
from tests.docs.blocks import blocks
from tests.tiny_models import make_model

MODEL = "acme/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/acme/tiny, and an adapter on it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("export")
    model_dir = make_model(root / "models" / MODEL, "llama")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(r=4, target_modules=["q_proj"]))
    model.peft_config["default"].base_model_name_or_path = MODEL
    model.save_pretrained(root / "adapter")
    return root


@pytest.fixture
def cli(folder: Path) -> CommandLine:
    return CommandLine(folder, TRAINER_MODELS_DIR=str(folder / "models"), DATABASE_URL="postgresql://me:s3cret@h/x")


def test_a_merged_model_is_written_and_reported(cli: CommandLine) -> None:
    said = cli.ok("export", "adapter", "--merged", "whole", "--json").lines[0]["merged"]
    merged = cli.folder / "whole"
    assert (said["path"], said["base_model"], said["merged_tensors"]) == (str(merged), MODEL, 2)
    assert not said["is_dequantised"]
    assert said["files"].keys() == {path.name for path in merged.iterdir()}
    assert json.loads((merged / "manifest.json").read_text())["base_model"] == MODEL
    again = cli.run("export", "adapter", "--merged", "whole")
    assert (again.status, "The folder whole exists already" in again.err) == (2, True)


def test_the_commands_of_the_page_do_what_it_says(cli: CommandLine) -> None:
    shown = [block.text for block in blocks() if block.page == "docs/how-to/export.md" and block.language == "sh"]
    assert len(shown) == 2
    for text in shown:
        program, *words = shlex.split(text.replace('"$job"', "adapter"))
        assert program == "brightrun-trainer"
        cli.ok(*words)
    assert (cli.folder / "merged" / "model.safetensors").is_file()
    assert (cli.folder / "for-transformers-4" / "adapter_config.json").is_file()


def test_its_progress_is_shown_to_a_person(cli: CommandLine) -> None:
    said = cli.ok("export", "adapter", "--merged", "shown")
    assert "merging shown" in said.err
    assert f"{MODEL} with 2 layers changed" in said.out


def test_an_adapter_for_transformers_4_needs_no_base_model(cli: CommandLine, folder: Path) -> None:
    said = cli.ok("export", "adapter", "--transformers4", "for4", TRAINER_MODELS_DIR=str(folder / "none"))
    assert "the adapter for transformers 4; adapter_config.json rewritten" in said.out
    assert (folder / "for4" / "adapter_model.safetensors").is_file()


def test_a_gguf_of_adapter_and_of_the_merged_model_are_written(cli: CommandLine) -> None:
    said = cli.ok("export", "adapter", "--gguf", "lora.gguf", "--json").lines[0]["gguf"]
    assert said == {
        "path": str(cli.folder / "lora.gguf"),
        "form": "adapter",
        "file": "lora.gguf",
        "modelfile": None,
        "base_model": MODEL,
        "architecture": "llama",
        "type": "f32",
        "tensors": 4,
        "lost_window": None,
        "bytes": (cli.folder / "lora.gguf").stat().st_size,
    }
    shown = cli.ok("export", "adapter", "--gguf", "whole.gguf", "--gguf-form", "merged", "--gguf-type", "q8_0")
    assert f"{MODEL} with the adapter in it" in shown.out
    assert "ollama create NAME --file whole.Modelfile" in shown.out
    assert (cli.folder / "whole.Modelfile").read_text().startswith("FROM ./whole.gguf\n")
    assert not list(cli.folder.glob(".whole*"))
    # From inside the adapter's folder, as its model card writes it.
    beside = cli.ok("export", "adapter", "--gguf", "adapter/../beside.gguf", "--gguf-form", "merged").out
    assert str(cli.folder / "beside.gguf") in beside and ".." not in beside
    assert "The file whole.gguf exists already" in cli.run("export", "adapter", "--gguf", "whole.gguf").err


def test_a_folder_for_ggufs_holds_the_file_and_its_modelfile(cli: CommandLine) -> None:
    cli.ok("export", "adapter", "--merged", "both", "--gguf", "for-ollama", "--gguf-form", "merged")
    assert {path.name for path in (cli.folder / "for-ollama").iterdir()} == {"model.gguf", "Modelfile"}
    assert (cli.folder / "both" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--gguf-form", "whole"), "no GGUF form 'whole'"),
        (("--gguf-form", "merged", "--gguf-type", "q4_k_m"), "llama.cpp's llama-quantize"),
        (("--gguf-type", "q8_0"), "fits a base of any type"),
    ],
)
def test_a_wrong_form_or_type_of_gguf_is_named(cli: CommandLine, asked: tuple[str, ...], says: str) -> None:
    found = cli.run("export", "adapter", "--gguf", "wrong.gguf", *asked)
    assert (found.status, says in found.err) == (1, True), found.err
    assert not list(cli.folder.glob("*wrong*"))


def test_bad_input_is_named_with_a_way_on(cli: CommandLine, folder: Path) -> None:
    asked = cli.run("export", "adapter")
    assert (asked.status, "--merged DIR" in asked.err) == (2, True)
    unused = cli.run("export", "adapter", "--merged", "x", "--gguf-type", "q8_0")
    assert (unused.status, "Add --gguf FILE" in unused.err) == (2, True)
    absent = cli.run("export", "adapter", "--merged", "x", TRAINER_MODELS_DIR=str(folder / "none"))
    assert absent.status == 1
    assert f"brightrun-trainer models pull {MODEL}" in absent.err and "--model" in absent.err
    other = make_model(folder / "other", "llama")
    Marker("acme/other").write(other)
    wrong = cli.run("export", "adapter", "--merged", "x", "--model", "other")
    assert (wrong.status, "holds acme/other" in wrong.err) == (2, True)
    twice = cli.run("export", "adapter", "--merged", "x", "--gguf", "x")
    assert (twice.status, "cannot have one name" in twice.err) == (2, True)
    assert not (folder / "x").exists()


def test_an_adapter_that_names_no_base_is_exported_with_the_base_that_is_named(cli: CommandLine, folder: Path) -> None:
    nameless = Path(shutil.copytree(folder / "adapter", folder / "nameless"))
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    assert "Name its folder with --model" in cli.run("export", "nameless", "--merged", "y").err
    said = cli.ok("export", "nameless", "--merged", "y", "--model", f"models/{MODEL}", "--json").lines[0]["merged"]
    assert (said["base_model"], said["merged_tensors"]) == ("tiny", 2)
