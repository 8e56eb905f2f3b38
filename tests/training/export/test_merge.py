"""The merged model is the base with the adapter in it: the same numbers, the same layout, and no more memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import ARCHITECTURES, OTHER_FAMILIES, make_model
from tests.training.conftest import ModelOf
from tests.training.export.conftest import AdapterOf
from training.adapter.tokenizer_files import for_transformers_4
from training.distance import distance
from training.export.merge import Merged, merge_adapter
from training.export.merging.merged_card import Origin, merged_card
from training.failures import TrainingFailed
from training.files.durable_files import sha256_of
from training.files.licence import Licence
from training.files.model_folder import ModelFolder, faults_of_model, read_header

FAMILIES = (*ARCHITECTURES, *OTHER_FAMILIES)
TOKENS = torch.arange(3, 60)[None]


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def in_float32(base: Path, to: Path) -> Path:
    """The same model stored in float32, where a merge rounds as little as the sum itself."""
    shutil.copytree(base, to)
    for shard in to.glob("*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return to


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_answers_as_base_and_adapter_do(
    family: str, tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    base = in_float32(tiny(family), tmp_path / family)
    adapter = adapter_of(base)
    merged = merge_adapter(base, adapter, tmp_path / "merged")
    beside = logits(base, adapter)
    assert distance(logits(base), beside) > 0.1
    assert distance(logits(Path(merged.path)), beside) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_its_layout_is_the_published_one_and_its_weights_are_those_of_peft(
    family: str, tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    base = tiny(family)
    adapter = adapter_of(base)
    merged = Path(merge_adapter(base, adapter, tmp_path / "merged").path)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert read_header(merged / "model.safetensors") == read_header(base / "model.safetensors")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert expected.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    for name, tensor in after.items():
        # Sums in another order may fall on the other side of a rounding, once in thousands of times. PEFT rounds what
        # it adds to a parameter (its adapter's layers are all listed so) before it adds it.
        most = 1.0 if family == "qwen3_next" else 1e-3
        assert (tensor != expected[name]).float().mean() < most, name
        assert tensor.equal(expected[name]) or distance(tensor, expected[name]) < 2**-8, name
    assert changed == {name for name in before if not before[name].equal(expected[name])}
    if family in ("qwen3_moe", "mixtral", "qwen3_next"):
        assert sum(".experts.0." in name for name in after) > 0


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model in several files, as the hub has it: licence, card, index, files of other forms."""
    folder = make_model(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "LICENSE").write_text("Apache License")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"another form")
    (folder / "params.json").write_text("{}")
    (folder / ".brightrun-model.json").write_text("{}")
    return folder


def test_shards_index_and_small_files_are_the_bases(sharded: Path, adapter_of: AdapterOf, tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    adapter = adapter_of(sharded)
    merged = merge_adapter(sharded, adapter, tmp_path / "a" / "merged", on_bytes=lambda *said: heard.append(said))
    folder = Path(merged.path)
    assert faults_of_model(folder) == []
    assert len(ModelFolder.of(folder).shards) > 3
    same = ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "LICENSE")
    for name in (*same, "chat_template.jinja"):
        assert (folder / name).read_bytes() == (sharded / name).read_bytes(), name
    # Saved by transformers 5, under a class that transformers 4 does not know.
    tokenizer = json.loads((sharded / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "TokenizersBackend"
    assert json.loads((folder / "tokenizer_config.json").read_text()) == for_transformers_4(tokenizer)
    names = {path.name for path in folder.iterdir()}
    assert names.isdisjoint({"pytorch_model.bin", "consolidated.safetensors", "params.json", ".brightrun-model.json"})
    assert not any(name.startswith(".") for name in names)
    card = (folder / "README.md").read_text()
    assert 'base_model: "tiny/base"\n' in card and 'license: "apache-2.0"\n' in card and "4 bits" not in card
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"].keys() | {"manifest.json"} == names
    for name, file in manifest["files"].items():
        assert file == {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    weights = sum(shard.stat().st_size for shard in ModelFolder.of(sharded).shards)
    assert heard[-1] == (weights, weights)
    assert distance(logits(folder), logits(sharded, adapter)) < 0.05


def test_the_template_that_the_adapter_was_trained_with_goes_along(tmp_path: Path, adapter_of: AdapterOf) -> None:
    base = make_model(tmp_path / "base", "qwen3", template=None)
    adapter = adapter_of(base)
    (adapter / "chat_template.jinja").write_text("ours")
    merged = Path(merge_adapter(base, adapter, tmp_path / "merged").path)
    assert not (base / "chat_template.jinja").exists()
    assert (merged / "chat_template.jinja").read_text() == "ours"


def test_the_card_says_what_the_template_was_told_and_quotes_what_others_wrote() -> None:
    card = merged_card(
        Origin("acme/tiny", "main", "0b5e", False, None, {"chat_template_kwargs": {"enable_thinking": False}})
    )
    assert "vllm serve . --default-chat-template-kwargs '{\"enable_thinking\": false}'" in card
    assert "acme/tiny, revision `main`, with a LoRA adapter merged into its weights (job `0b5e`)" in card
    hostile = merged_card(
        Origin("a\n---\n[x](y)", "`x`", "<b>", False, Licence("other", "README.md", "n\n---"), {"x": 1})
    )
    assert yaml.safe_load(hostile.split("---\n")[1])["license_name"] == "n\n---"
    assert "[x](y)" not in hostile.split("---\n", 2)[2] and "<b>" not in hostile
    assert "vllm serve .\n" in hostile


def edit(config: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / config
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def as_fp8(base: Path) -> None:
    edit("config.json", quantization_config={"quant_method": "fp8"})(base)


def one_tensor_in_fp8(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def without_an_index(base: Path) -> None:
    (base / "model.safetensors").unlink()


def damaged(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"\x00" * 40)


def overflowing(base: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(base / "model.safetensors").items()}
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = torch.full_like(tensors[name], 65504.0)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def of_huge_scale(adapter: Path) -> None:
    edit("adapter_config.json", lora_alpha=10**6)(adapter)


@pytest.mark.parametrize(
    ("of_base", "of_adapter", "code", "words"),
    [
        (as_fp8, None, "model_unsupported", "published in 8 bits (FP8), and a merge needs them in 16 bits"),
        (one_tensor_in_fp8, None, "model_unsupported", "as F8_E4M3"),
        (without_an_index, None, "model_incomplete", "no weights"),
        (overflowing, of_huge_scale, "model_unsupported", "would not be finite"),
        (None, damaged, "invalid_spec", "adapter_model.safetensors cannot be read"),
        (None, edit("adapter_config.json", use_dora=True), "invalid_spec", "use_dora = true"),
        (None, edit("adapter_config.json", bias="all"), "invalid_spec", 'bias = "all"'),
        (None, edit("adapter_config.json", peft_type="IA3"), "invalid_spec", "only LoRA"),
        (None, lambda adapter: (adapter / "adapter_config.json").unlink(), "invalid_spec", "cannot be read"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    of_base: Callable[[Path], None] | None,
    of_adapter: Callable[[Path], None] | None,
    code: str,
    words: str,
    tiny: ModelOf,
    adapter_of: AdapterOf,
    tmp_path: Path,
) -> None:
    base = Path(shutil.copytree(tiny("qwen3"), tmp_path / "base"))
    adapter = adapter_of(base)
    for change, folder in ((of_base, base), (of_adapter, adapter)):
        if change is not None:
            change(folder)
    with pytest.raises(TrainingFailed) as refused:
        merge_adapter(base, adapter, tmp_path / "to" / "merged")
    assert (refused.value.code, words in refused.value.message) == (code, True), refused.value.message
    assert refused.value.hint
    assert not list((tmp_path / "to").glob("*")) if (tmp_path / "to").exists() else True


def test_an_adapter_of_another_base_is_refused(tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path) -> None:
    adapter = adapter_of(tiny("qwen3"), revision="1111222233334444")
    wider = make_model(tmp_path / "wider", "qwen3", hidden_size=128)

    def refusal(base: Path, **options: Any) -> str:
        with pytest.raises(TrainingFailed) as refused:
            merge_adapter(base, adapter, tmp_path / "merged", **options)
        return refused.value.message + refused.value.hint

    assert "down_proj is 64 × 128, and that of tiny/qwen3 has the shape (128, 128)" in refusal(wider)
    assert "has no layer" in refusal(tiny("phi3"))
    assert "at the revision 111122223333" in refusal(tiny("qwen3"), base_revision="5555666677778888")
    assert "--revision 1111222233334444" in refusal(tiny("qwen3"), base_revision="5555666677778888")
    assert "is not on this host" in refusal(tmp_path / "nowhere")
    (tmp_path / "merged").mkdir()
    assert "exists already" in refusal(tiny("qwen3"))


def test_a_layer_that_shares_its_weight_is_not_merged(tmp_path: Path) -> None:
    """Some files hold a tied output layer once more. A reader takes the embeddings for it, and its change is lost."""
    base = make_model(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["lm_head"])).save_pretrained(
        tmp_path / "adapter", save_embedding_layers=False
    )
    with pytest.raises(TrainingFailed, match="lm_head, whose weight"):
        merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_which_revision_was_merged_is_known_or_said_to_be_unknown(
    tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    adapter = adapter_of(tiny("qwen3"), revision="1111222233334444")

    def merged(name: str, revision: str | None) -> Merged:
        return merge_adapter(tiny("qwen3"), adapter, tmp_path / name, base_revision=revision)

    assert merged("known", "1111222233334444").revision_is_known
    assert "revision `1111222233334444`" in (tmp_path / "known" / "README.md").read_text()
    assert not merged("unknown", None).revision_is_known
    manifest = json.loads((tmp_path / "unknown" / "manifest.json").read_text())
    assert (manifest["base_model_revision"], manifest["trained_on_revision"]) == (None, "1111222233334444")
    assert "revision" not in (tmp_path / "unknown" / "README.md").read_text()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_stabilised_scales_and_alphas_of_single_layers_are_pefts(
    use_rslora: bool, tiny: ModelOf, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    base = in_float32(tiny("qwen3"), tmp_path / "base")
    adapter = adapter_of(base)
    edit("adapter_config.json", use_rslora=use_rslora, alpha_pattern={"q_proj": 3, r"layers.1.*up_proj": 1})(adapter)
    merged = merge_adapter(base, adapter, tmp_path / "merged")
    assert distance(logits(Path(merged.path)), logits(base, adapter)) < 1e-5
