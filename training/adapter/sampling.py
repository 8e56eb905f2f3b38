"""Samples the model's answers before and after training: short, greedy, all prompts at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from training.data.chat_template import ChatTemplate
from training.data.corpus import Corpus
from training.data.formats.conversation import Turn
from training.spec import JobSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Enough to see the style. Generating is the one thing that a quantised model does slowly on a CPU: every token unpacks
# every weight.
_PROMPTS = 2
_NEW_TOKENS = {"cuda": 96, "cpu": 32}


def choose_prompts(spec: JobSpec, corpus: Corpus) -> tuple[tuple[Turn, ...], ...]:
    """Returns the job's own prompts, or else the beginnings of the first held-out conversations."""
    asked = spec.hyperparameters.sample_prompts
    if asked is not None:
        return tuple((Turn("user", prompt, trained=False),) for prompt in asked)
    beginnings = []
    for conversation in corpus.held_out[:_PROMPTS]:
        # Nothing asks for an answer that opens a conversation.
        first = next((index for index, turn in enumerate(conversation.turns) if turn.trained and index), None)
        if first is not None:
            beginnings.append(conversation.turns[:first])
    return tuple(beginnings)


def answer(
    spec: JobSpec,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    prompts: tuple[tuple[Turn, ...], ...],
) -> list[tuple[str, str]]:
    """Returns (last words of the prompt, answer) for each prompt, in order. Restores the model's mode."""
    if not prompts:
        return []
    texts = [template.prompt(prompt) for prompt in prompts]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    encoded = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
    tokenizer.padding_side = side
    device = model.get_input_embeddings().weight.device
    inputs = {"input_ids": encoded["input_ids"].to(device), "attention_mask": encoded["attention_mask"].to(device)}
    was_training = model.training
    model.eval()
    # In the types of training: autocast, which training does without, would compute the adapter in others.
    with torch.no_grad():
        generated = model.generate(
            **inputs,
            max_new_tokens=_NEW_TOKENS[spec.device],
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    model.train(was_training)
    answers = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [(prompt[-1].content, text.strip()) for prompt, text in zip(prompts, answers, strict=True)]
