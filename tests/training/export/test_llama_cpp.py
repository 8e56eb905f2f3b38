"""llama.cpp itself reads our GGUF files: it answers as transformers does, with and without the adapter.

xllamacpp carries llama.cpp's server as a wheel; only these tests' processes see it.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny_models import ARCHITECTURES, CHATML, OTHER_FAMILIES, conversation, make_model, make_tokenizer
from tests.training.export.conftest import AdapterOf
from tests.training.export.llama_cpp import ask_llama_cpp
from tests.training.export.test_gguf import fields_of
from training.export.gguf_adapter import write_gguf_adapter
from training.export.gguf_model import write_gguf_model

pytestmark = pytest.mark.system

# The scaled rotary positions of long contexts, each as a published model has them, from a context of 64.
_SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3.1": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "max_position_embeddings": 256,
        },
    ),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + 0.1 * step for step in range(6)],
                "long_factor": [2.0 + step for step in range(6)],
            },
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 2048,
        },
    ),
}
_PROMPTS = [list(range(3, 83)), [5, 100, 7, 300, 22]]
# llama.cpp looks Gemma's GELU up in a table of 16 bits.
_TOLERANCE = {"gemma2": 0.01, "gemma3": 0.01}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHER_FAMILIES])
def test_llama_cpp_answers_as_transformers_with_and_without_the_adapter(
    architecture: str, adapter_of: AdapterOf, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / architecture, architecture, **_wide(architecture))
    adapter = adapter_of(folder, lora_rank=8)
    whole, lora = tmp_path / "model.gguf", tmp_path / "lora.gguf"
    write_gguf_model(folder, whole, type_="f32")
    write_gguf_adapter(folder, adapter, lora)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = _logprobs(base)
    adapted = _logprobs(PeftModel.from_pretrained(base, adapter))

    tolerance = _TOLERANCE.get(architecture, 5e-4)
    assert _distance(ask_llama_cpp(whole, prompts=_PROMPTS, words=512)["logprobs"], plain) < tolerance
    assert _distance(ask_llama_cpp(whole, lora=str(lora), prompts=_PROMPTS, words=512)["logprobs"], adapted) < tolerance
    assert max((a - b).abs().max().item() for a, b in zip(plain, adapted, strict=True)) > 100 * tolerance


@pytest.mark.parametrize("kind", _SCALED)
def test_llama_cpp_stretches_positions_as_transformers(kind: str, tmp_path: Path) -> None:
    architecture, config = _SCALED[kind]
    folder = make_model(tmp_path / "model", architecture, **_wide(architecture), **config)
    write_gguf_model(folder, tmp_path / "model.gguf", type_="f32")
    expected = _logprobs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))

    found = ask_llama_cpp(tmp_path / "model.gguf", prompts=_PROMPTS, words=512)["logprobs"]

    assert _distance(found, expected) < 5e-4


@pytest.mark.parametrize("architecture", ["mistral", "phi3"])
def test_llama_cpp_leaves_out_windows_as_we_tell(architecture: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", architecture, initializer_range=0.2, sliding_window=16)
    written = write_gguf_model(folder, tmp_path / "model.gguf", type_="f32")
    beyond, within = _logprobs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))

    found = ask_llama_cpp(tmp_path / "model.gguf", prompts=_PROMPTS, words=512)["logprobs"]

    assert written.lost_window == 16
    assert _distance(found[1:], [within]) < 5e-4
    assert _distance(found[:1], [beyond]) > 1


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0"])
def test_llama_cpp_reads_every_type(kind: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3_next", initializer_range=0.2)
    write_gguf_model(folder, tmp_path / "model.gguf", type_=kind)
    expected = _logprobs(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))

    found = ask_llama_cpp(tmp_path / "model.gguf", prompts=_PROMPTS, words=512)["logprobs"]

    # Activations are rounded as well; the answers are spread over ±5.
    assert _distance(found, expected) < 0.5


_TEXTS = [
    "Hello world's  test\n\n 12345 don't",
    "Größe: 3,50 € — naïve façade 日本語 🙂\t\ttabs",
    "  two spaces before, and after  ",
    "WE'RE here I'Ll see X1 camelCaseWord HTTPServer",
]


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "tekken", "gpt-4o"])
def test_llama_cpp_splits_text_as_byte_level_tokenizers_do(kind: str, tmp_path: Path) -> None:
    tokenizer = _byte_level(kind)
    folder = make_model(tmp_path / "model", "llama", tokenizer=tokenizer)
    write_gguf_model(folder, tmp_path / "model.gguf")
    chat = conversation(1, system=True)["messages"][:2]

    found = ask_llama_cpp(tmp_path / "model.gguf", texts=[*_TEXTS, _rendered(folder, chat)], chats=[chat])

    real = AutoTokenizer.from_pretrained(folder)
    assert fields_of(tmp_path / "model.gguf")["tokenizer.ggml.pre"] == kind
    assert found["rendered"] == [_rendered(folder, chat)]
    assert found["tokens"] == [real(text)["input_ids"] for text in [*_TEXTS, _rendered(folder, chat)]]


@pytest.mark.parametrize("kind", ["llama 2", "mistral", "gemma"])
def test_llama_cpp_splits_text_as_sentencepieces_tokenizers_do(kind: str, tmp_path: Path) -> None:
    tokenizer = _sentencepiece(kind)
    folder = make_model(tmp_path / "model", "llama", tokenizer=tokenizer)
    write_gguf_model(folder, tmp_path / "model.gguf")
    chat = conversation(1, system=True)["messages"][:2]
    chat_text = _rendered(folder, chat)

    found = ask_llama_cpp(tmp_path / "model.gguf", texts=[*_TEXTS, chat_text], chats=[chat])

    real = AutoTokenizer.from_pretrained(folder)
    expected = [real(text)["input_ids"] for text in _TEXTS]
    # A chat carries its own special tokens: servers add no other.
    in_chat = real(chat_text, add_special_tokens=False)["input_ids"]
    assert found["rendered"] == [chat_text]
    assert found["tokens"][-1][-len(in_chat) :] == in_chat
    if kind != "mistral":
        assert found["tokens"][:-1] == expected


def test_llama_cpp_ends_an_answer_where_the_template_does(tmp_path: Path) -> None:
    """Also if that is another token than the end of a text, and one that llama.cpp does not know by name."""
    template = CHATML.replace("<|im_end|>", "<|fin|>")
    tokenizer = make_tokenizer(template, extra_tokens=("<|fin|>",), eos="<|endoftext|>")
    folder = make_model(tmp_path / "model", "llama", tokenizer=tokenizer)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<|fin|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    write_gguf_model(folder, tmp_path / "model.gguf")

    assert ask_llama_cpp(tmp_path / "model.gguf", ends=["<|fin|>", "<|endoftext|>", "<|im_start|>"])["ended"] == [
        True,
        True,
        False,
    ]


def _wide(architecture: str) -> dict[str, Any]:
    """Weights large enough that a wrong row shows, and what llama.cpp takes as given."""
    return {"initializer_range": 0.2, **({"norm_topk_prob": True} if architecture == "qwen3_moe" else {})}


def _logprobs(model: Any) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in _PROMPTS]


def _distance(found: list[dict[str, float]], expected: list[torch.Tensor]) -> float:
    for answer, tensor in zip(found, expected, strict=True):
        assert len(answer) == len(tensor)
    return max(
        abs(answer[str(word)] - tensor[word].item())
        for answer, tensor in zip(found, expected, strict=True)
        for word in range(len(tensor))
    )


def _rendered(folder: Path, chat: list[dict[str, str]]) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


def _byte_level(kind: str) -> Any:
    """A tokenizer with 512 words that splits text as the published ones do which llama.cpp calls by this name."""
    from tokenizers import Regex, pre_tokenizers

    from training.export.gguf_vocabulary import _EXPRESSIONS

    tokenizer = make_tokenizer(extra_tokens=("<|start|>",), bos=None)
    backend = tokenizer.backend_tokenizer
    if kind == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif kind != "gpt-2":
        wanted = "llama-bpe" if kind == "dbrx" else kind
        expression = next(expression for expression, name in _EXPRESSIONS.items() if name == wanted)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(expression), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.model.ignore_merges = kind == "llama-bpe"
    return tokenizer


def _sentencepiece(kind: str) -> Any:
    """Words and merges as transformers makes them of a SentencePiece model, with bytes for what has no word."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    specials = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    corpus = [message["content"] for number in range(200) for message in conversation(number)["messages"]]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated")
    letters = list(string.ascii_letters + string.digits + string.punctuation)
    trained.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=letters, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    words = specials + [f"<0x{byte:02X}>" for byte in range(256)]
    words += [word for word in sorted(model["vocab"], key=model["vocab"].get) if word not in specials]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(words)},
            merges=[tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if kind == "llama 2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHATML
    return fast
