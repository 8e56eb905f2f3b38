"""Writes the model card, the README.md beside an adapter: what it is, how it is served, and how it was trained.

It may be published, so it holds counts and settings, never a word of the data or the name of a folder or host. Every
name in it comes from outside: each is written so that it stays text, whatever characters it has.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.files.licence import Licence
from training.results.front_matter import front_matter
from training.results.history import RunHistory
from training.results.serving import NAME, Serving

CARD = "README.md"
_TAGS = ("lora", "transformers", "brightrun-trainer")

# What decides about the result, in the order in which it is read; the words for each.
_SETTINGS = {
    "lora_rank": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "lora_dropout": "LoRA dropout",
    "learning_rate": "learning rate (peak)",
    "schedule": "schedule",
    "warmup_steps": "warm-up steps",
    "num_epochs": "epochs",
    "batch_size": "batch size (conversations a step)",
    "max_length": "longest conversation (tokens)",
    "optimizer": "optimizer",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient norm, clipped at",
    "seed": "seed",
}


@dataclass(frozen=True)
class Trained:
    """How the training went: `counts` of the data, `settings` as they were used, and the curves' ends."""

    counts: Mapping[str, int]
    settings: Mapping[str, Any]
    quantization: str | None
    compute_type: str
    journal: RunHistory
    versions: Mapping[str, str]


def model_card(serving: Serving, trained: Trained, licence: Licence | None) -> str:
    """Returns the card: front matter that the hub reads, then Markdown."""
    parts = [
        front_matter(serving.base_model, licence, relation="adapter", library="peft", tags=_TAGS),
        f"# LoRA adapter for {_code(serving.base_model)}",
        _introduction(serving, trained),
        *_serving(serving),
        "## Training",
        _data(trained),
        *_curves(trained.journal),
        _table(("setting", "value"), _settings(serving, trained)),
        "## License",
        _licence(licence),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(serving: Serving, trained: Trained) -> str:
    revision = f", revision {_code(serving.revision)}" if serving.revision else ""
    best, evaluations = trained.journal.best, trained.journal.evaluations
    text = f"A LoRA adapter of rank {serving.rank} for {_code(serving.base_model)}{revision}."
    if best is not None and evaluations[0].step == 0:
        text += (
            f" The loss on conversations that it was not trained on went from {_number(evaluations[0].validation_loss)}"
            f" to {_number(best.validation_loss)}."
        )
    return text


def _serving(serving: Serving) -> Iterable[str]:
    yield "## Serve it"
    yield "The commands are run in the folder of this file."
    if "/" not in serving.base_model:
        yield (
            f"{_code(serving.base_model)} is the base model's name where this adapter was trained. Where a server does "
            "not know it, write the path of the model's folder instead, or its name on the hub."
        )
    if note := _thinking(serving):
        yield note
    yield "### vLLM"
    yield _block("sh", _lines(serving.vllm_arguments("$PWD")))
    yield f"Requests name the model {_code(NAME)}:"
    yield _block(
        "sh",
        "curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "{NAME}", "messages": [{{"role": "user", "content": "Hello"}}]}}\'',
    )
    yield "### RunPod's vLLM worker"
    yield (
        "Put this folder on the endpoint's network volume as `adapter`, and set these environment variables. (With the "
        "adapter on the Hugging Face hub, `path` is its name there.)"
    )
    yield _block("text", "\n".join(f"{name}={_plain(value)}" for name, value in serving.runpod_variables().items()))
    yield "### transformers and PEFT"
    yield _block("sh", f'pip install "peft>={serving.peft}" "transformers>=4.57" accelerate')
    yield _block("python", _python(serving))
    yield "For transformers 4, where this folder does not open there:"
    yield _block("sh", "brightrun-trainer export . --transformers4 ../transformers4")
    yield from _elsewhere(serving)


def _thinking(serving: Serving) -> str | None:
    thinking = serving.thinking
    if thinking.options:
        options = ", ".join(f"{name}={value}" for name, value in thinking.options.items())
        return (
            f"The adapter was trained on the prompts that the base model's chat template makes with {_code(options)}. "
            "A server must give it the same, as below; other prompts are not those that it was trained on."
        )
    if thinking.opens_thought:
        return (
            "The base model's chat template begins a thought before every answer. The adapter was trained on answers "
            "without one and ends the thought at once, so an answer begins with `</think>`. A server's reasoning "
            "parser (in vLLM `--reasoning-parser deepseek_r1`) takes it away."
        )
    if thinking.answers_at_once:
        return (
            "The base model can think before it answers. The adapter was trained to answer at once, after the prompt "
            "that a server makes unless it is told otherwise. Serve it without a reasoning parser, which would take "
            "the answer for a thought."
        )
    return None


def _python(serving: Serving) -> str:
    revision = f", revision={_literal(serving.revision)}" if serving.revision else ""
    options = (f"    {name}={value!r}," for name, value in serving.thinking.options.items())
    model = f'{_literal(serving.base_model)}{revision}, dtype="auto", device_map="auto"'
    return "\n".join(
        (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'adapter = "."  # this folder, or its name on the Hugging Face hub',
            "tokenizer = AutoTokenizer.from_pretrained(adapter)",
            f"base = AutoModelForCausalLM.from_pretrained({model})",
            "model = PeftModel.from_pretrained(base, adapter)",
            "prompt = tokenizer.apply_chat_template(",
            '    [{"role": "user", "content": "Hello"}],',
            "    add_generation_prompt=True,",
            '    return_tensors="pt",',
            "    return_dict=True,",
            *options,
            ").to(model.device)",
            "answer = model.generate(**prompt, max_new_tokens=200)",
            'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
        )
    )


def _elsewhere(serving: Serving) -> Iterable[str]:
    yield "### llama.cpp"
    yield "The adapter as GGUF, beside the base model as GGUF:"
    yield _block(
        "sh", "brightrun-trainer export . --gguf ../adapter.gguf\n" + _lines(serving.llama_arguments("../adapter.gguf"))
    )
    yield "### Ollama"
    yield "Ollama takes no adapters any more, so base model and adapter are merged into one file:"
    yield _block(
        "sh",
        "brightrun-trainer export . --gguf ../model.gguf --gguf-form merged\n"
        f"ollama create {NAME} -f ../model.Modelfile",
    )
    yield "### Other servers"
    yield (
        "SGLang has no adapters for this model's linear attention. "
        if serving.has_linear_attention
        else f"SGLang takes this folder (`--enable-lora --lora-paths {NAME}=.`). "
    ) + "Every server of the base model serves the two merged:"
    yield _block("sh", "brightrun-trainer export . --merged ../merged")


def _data(trained: Trained) -> str:
    counts = trained.counts
    held_out = counts.get("validation_conversations", 0)
    return (
        f"Trained on {_count(counts.get('train_conversations', 0), 'conversation')} with "
        f"{_count(counts.get('train_answers', 0), 'answer')}"
        + (f"; {_count(held_out, 'conversation')} held out" if held_out else "")
        + ". Only the assistant's words carry loss."
    )


def _curves(journal: RunHistory) -> Iterable[str]:
    """The ends of both curves. A loss is the mean of natural logarithms over trained tokens."""
    rows = []
    if journal.evaluations:
        first, last, best = journal.evaluations[0], journal.evaluations[-1], journal.best
        kept = (best.validation_loss, best.step) if best is not None else (None, None)
        rows.append(
            ("held out", _at(first.validation_loss, first.step), _at(*kept), _at(last.validation_loss, last.step))
        )
    if journal.steps:
        begin, end = journal.steps[0], journal.steps[-1]
        rows.append(("training", _at(begin.loss, begin.step), "", _at(end.loss, end.step)))
    if rows:
        yield _table(("loss", "first", "best, kept", "last"), rows)


def _settings(serving: Serving, trained: Trained) -> Iterable[tuple[str, str]]:
    used = trained.settings
    yield from ((words, _code(used[name])) for name, words in _SETTINGS.items() if used.get(name) is not None)
    yield "adapted layers", " ".join(map(_code, serving.modules))
    yield "base model's weights in training", _code(trained.quantization or trained.compute_type)
    yield "computed in", _code(trained.compute_type)
    yield "trained with", ", ".join(f"{_code(name)} {_code(version)}" for name, version in trained.versions.items())


def _licence(licence: Licence | None) -> str:
    if licence is None:
        return "The base model's folder states no license: see where the base model was published."
    name = licence.license if licence.license != "other" or licence.name is None else licence.name
    link = f" ({_code(licence.link)})" if licence.link else ""
    return f"The base model is licensed under {_code(name)}{link}, as its {_code(licence.source)} states."


def _at(loss: float | None, step: int | None) -> str:
    if loss is None:
        return "unknown"
    return f"{_number(loss)} (before training)" if step == 0 else f"{_number(loss)} (step {step})"


def _number(loss: float) -> str:
    return f"{loss:.4f}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _lines(arguments: Sequence[str]) -> str:
    """Returns a command with a line for each option. `$PWD` is the shell's own."""
    words = [f'"{word}"' if "$PWD" in word else shlex.quote(_plain(word)) for word in arguments]
    text = words[0]
    for word in words[1:]:
        text += f" \\\n  {word}" if word.startswith("--") else f" {word}"
    return text


def _block(language: str, text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _code(value: object) -> str:
    """Writes a value as code: nothing in it is Markdown, in a table as well."""
    text = _plain(str(value)).replace("|", "¦").strip() or "-"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def _literal(text: str | None) -> str:
    return json.dumps(text)


def _plain(text: str) -> str:
    """One line of printable characters: control characters, also those that turn a line around, become spaces."""
    return "".join(character if character.isprintable() else " " for character in text)
