"""The model card and the `serving` block: what they say is so, the hub can read it, and no name can break it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from training.data.template.thinking import Thinking
from training.files.licence import Licence, licence_of
from training.files.vllm_ranks import VLLM_RANKS
from training.results.history import EvaluationRecord, RunHistory, StepRecord
from training.results.model_card import Trained, model_card
from training.results.serving import Serving, serving_of

DENSE = {"base_model_name_or_path": "acme/base", "revision": "abc", "r": 24, "target_modules": ["v_proj", "q_proj"]}
MIXTURE = DENSE | {
    "target_modules": ["in_proj_qkvz", "q_proj"],
    "target_parameters": ["mlp.shared_expert.down_proj.weight"],
}


def _serving(config: dict[str, Any] = DENSE, base: dict[str, Any] | None = None, **more: Any) -> Serving:
    options = {"peft": "0.14", "brings_template": False, "thinking": Thinking(), **more}
    return serving_of(config, base or {}, **options)


def _trained(**settings: Any) -> Trained:
    journal = RunHistory(
        steps=[StepRecord(1, 0.1, 3.5, 1e-4, 1.0, None, 10), StepRecord(30, 3.0, 0.5, 0.0, 1.0, None, 300)],
        evaluations=[EvaluationRecord(0, 0.0, 3.25), EvaluationRecord(20, 2.0, 1.125), EvaluationRecord(30, 3.0, 1.5)],
    )
    return Trained(
        counts={"train_conversations": 1200, "train_answers": 3000, "validation_conversations": 1},
        settings={"lora_rank": 24, "learning_rate": 2e-4, **settings},
        quantization="nf4",
        compute_type="bfloat16",
        journal=journal,
        versions={"peft": "0.21.2"},
    )


def _front_matter(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(card.split("---\n")[1]))


def test_the_rank_is_told_to_vllm_as_the_smallest_that_it_takes() -> None:
    taken = {rank: _serving(DENSE | {"r": rank}).max_lora_rank for rank in (1, 2, 8, 9, 16, 24, 65, 257, 321, 512)}
    assert taken == {1: 1, 2: 8, 8: 8, 9: 16, 16: 16, 24: 32, 65: 128, 257: 320, 321: 512, 512: 512}
    assert set(taken.values()) <= set(VLLM_RANKS)


def test_a_mixture_s_experts_are_left_out_and_sglang_gets_linear_attention_merged() -> None:
    dense, mixture = _serving(), _serving(MIXTURE, {"num_experts": 512})
    assert "--lora-target-modules" not in dense.vllm_arguments(".")
    command = shlex.join(mixture.vllm_arguments("."))
    assert "--lora-target-modules down_proj in_proj_qkvz q_proj" in command
    assert mixture.runpod_variables()["VLLM_EXTRA_ARGS"] == "--lora-target-modules down_proj in_proj_qkvz q_proj"
    assert (dense.as_dict()["forms"]["sglang"], mixture.as_dict()["forms"]["sglang"]) == ("adapter", "merged")
    assert "--lora-paths" in model_card(dense, _trained(), None)
    assert "--lora-paths" not in model_card(mixture, _trained(), None)


def test_a_template_of_ours_and_its_options_are_told_to_every_server() -> None:
    serving = _serving(brings_template=True, thinking=Thinking({"enable_thinking": False}))
    command = serving.vllm_arguments("/adapters/a")
    assert command[command.index("--chat-template") + 1] == "/adapters/a/chat_template.jinja"
    assert command[command.index("--default-chat-template-kwargs") + 1] == '{"enable_thinking": false}'
    llama = serving.llama_arguments("adapter.gguf")
    assert llama[llama.index("--chat-template-file") + 1] == "chat_template.jinja"
    assert llama[llama.index("--chat-template-kwargs") + 1] == '{"enable_thinking": false}'
    variables = serving.runpod_variables()
    assert variables["CUSTOM_CHAT_TEMPLATE"] == "/runpod-volume/adapter/chat_template.jinja"
    assert shlex.split(variables["VLLM_EXTRA_ARGS"])[1] == '{"enable_thinking": false}'
    card = model_card(serving, _trained(), None)
    assert "enable_thinking=False" in card and serving.as_dict()["chat_template_kwargs"] == {"enable_thinking": False}


def test_the_card_says_what_stands_before_an_answer() -> None:
    cards = [
        model_card(_serving(thinking=thinking), _trained(), None)
        for thinking in (Thinking(), Thinking(answers_at_once=True), Thinking(opens_thought=True))
    ]
    assert ["reasoning parser" in card for card in cards] == [False, True, True]
    assert "--reasoning-parser" in cards[2] and "--reasoning-parser" not in cards[1]


def test_the_card_says_what_it_was_trained_on_and_how_it_went() -> None:
    card = model_card(_serving(), _trained(), None)
    assert "went from 3.2500 to 1.1250" in card
    assert "| held out | 3.2500 (before training) | 1.1250 (step 20) | 1.5000 (step 30) |" in card
    assert "| training | 3.5000 (step 1) |  | 0.5000 (step 30) |" in card
    assert "1,200 conversations with 3,000 answers; 1 conversation held out" in card
    assert "| LoRA rank | `24` |" in card and "| learning rate (peak) | `0.0002` |" in card


def test_a_base_model_that_is_only_a_folder_s_name_is_said_to_be_one() -> None:
    said = "write the path of the model's folder"
    assert said not in model_card(_serving(), _trained(), None)
    assert said in model_card(_serving(DENSE | {"base_model_name_or_path": "tiny"}), _trained(), None)


def test_a_run_without_held_out_conversations_or_steps_has_a_card_too() -> None:
    nothing = Trained({}, {}, None, "float32", RunHistory(), {})
    assert "## Training" in model_card(_serving(), nothing, None)


def test_the_hub_reads_the_front_matter() -> None:
    card = model_card(_serving(), _trained(), Licence("other", "README.md", "acme-terms", "https://acme.example/terms"))
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == "acme/base" and data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft" and "lora" in data["tags"]
    assert (data["license"], data["license_name"]) == ("other", "acme-terms")
    assert data["license_link"] == "https://acme.example/terms"
    assert "license" not in ModelCard(model_card(_serving(), _trained(), None)).data.to_dict()


ODD = [
    "```\n# Injected\n",
    "`a` <script>alert(1)</script>",
    "| a | b |\n|---|---|",
    '"; rm -rf / #',
    "$(touch /tmp/x)",
    "---\nlicense: mit\n---",
    "[x](javascript:alert(1))",
    "\u202edesrever",
    "",
    "null",
    "![i](http://x)",
]


@pytest.mark.parametrize("odd", ODD)
def test_no_name_breaks_the_card(odd: str) -> None:
    def card_of(name: str, text: str) -> str:
        serving = _serving(DENSE | {"base_model_name_or_path": name, "revision": text, "target_modules": [text, "q"]})
        return model_card(serving, _trained(optimizer=text), Licence("other", "LICENSE", text, text))

    card, plain = card_of(odd, odd), card_of("acme/base" if "/" in odd else "base", "plain")
    assert _front_matter(card)["base_model"] == odd and "license_link" not in _front_matter(card)
    # The same document: nothing that a name holds became a heading, a table, a link or a block of its own.
    assert _shape(card) == _shape(plain)
    for block in re.findall(r"```+sh\n(.*?)\n```", card, re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            assert shlex.split(line)[0] in {"vllm", "curl", "pip", "brightrun-trainer", "llama-server", "ollama"}
    (program,) = re.findall(r"```+python\n(.*?)\n```", card, re.DOTALL)
    compile(program, "card", "exec")


def _shape(card: str) -> list[str]:
    """What kinds of blocks and spans the card has, in order, without its front matter."""
    body = card.split("\n---\n", 1)[1]
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    kinds = []
    for token in tokens:
        kinds.append(f"{token.type} {token.tag}")
        kinds += [child.type for child in token.children or () if child.type not in {"text", "code_inline"}]
    return kinds


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlicense: apache-2.0\ntags:\n- x\n---\n# Model"}, Licence("apache-2.0", "README.md")),
        (
            {
                "README.md": '---\nlicense: other\nlicense_name: "acme-terms" # ours\nlicense_link: https://a.example\n---\n'
            },
            Licence("other", "README.md", "acme-terms", "https://a.example"),
        ),
        # A list of them is not one of them; the file says more.
        (
            {"README.md": "---\nlicense: [mit, x]\n---\n", "LICENSE": "MIT License\n\nCopyright"},
            Licence("mit", "LICENSE"),
        ),
        ({"README.md": "license: mit\n"}, None),
        (
            {"LICENSE": "\n            Apache License\n        Version 2.0, January 2004\n"},
            Licence("apache-2.0", "LICENSE"),
        ),
        ({"LICENSE.txt": "# ACME COMMUNITY LICENSE\n"}, Licence("other", "LICENSE.txt", "ACME COMMUNITY LICENSE")),
        ({"LICENSE": "  \n"}, None),
        ({}, None),
    ],
)
def test_the_licence_is_what_the_folder_states(files: dict[str, str], expected: Licence | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert licence_of(tmp_path) == expected
