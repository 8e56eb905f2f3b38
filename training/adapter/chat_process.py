"""Answers questions with the base model and with its adapter: `python -m training.adapter.chat_process MODEL ADAPTER`.

A process for a person at a terminal. It reads one `{"question": …}` or `{"forget": true}` per line from stdin and
writes JSON lines: `ready`, then two answers to each question, the base model's first. Only one model is in memory: the
base model answers with the adapter switched off. Each keeps its own conversation until it is told to forget.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.formats.conversation import Turn
from training.failures import TrainingFailed
from training.files.model_folder import ModelFolder, open_model_folder
from training.files.template_options import template_options
from training.json_lines import Say, own_stdout
from training.quick_imports import quick_imports
from training.spec import Hyperparameters, JobSpec

if TYPE_CHECKING:
    from training.data.chat_template import ChatTemplate


class Pair:
    """The base model and its adapter, each with its own conversation."""

    def __init__(self, model_dir: Path, adapter_dir: Path, max_new_tokens: int) -> None:
        with quick_imports():
            import torch

            from training.adapter.open_adapter import open_adapter
            from training.base.load import load_base_model
            from training.data.chat_template import ChatTemplate
            from training.data.template.thinking import Thinking
            from training.data.tokenizer import load_tokenizer, stop_tokens

        folder = open_model_folder(model_dir, model_dir.name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = device
        self._max_new_tokens = max_new_tokens
        self._tokenizer: Any = load_tokenizer(folder)
        self._template: ChatTemplate = ChatTemplate(self._tokenizer, stops=stop_tokens(folder))
        self._template.use(Thinking(template_options(adapter_dir) or {}))
        self._model: Any = open_adapter(load_base_model(_spec(model_dir, device, folder), folder), adapter_dir)
        self.forget()

    def forget(self) -> None:
        self._turns: dict[str, tuple[Turn, ...]] = {"base": (), "adapter": ()}

    def ask(self, question: str, say: Say) -> None:
        """Reports both answers, each as soon as it is known."""
        for who in ("base", "adapter"):
            turns = (*self._turns[who], Turn("user", question, trained=False))
            if who == "base":
                with self._model.disable_adapter():
                    text = self._answer(turns)
            else:
                text = self._answer(turns)
            self._turns[who] = (*turns, Turn("assistant", text, trained=False))
            say({"kind": "answer", "who": who, "text": text})

    def _answer(self, turns: tuple[Turn, ...]) -> str:
        """Answers greedily: the same conversation gives the same words."""
        import torch

        encoded = self._tokenizer(self._template.prompt(turns), add_special_tokens=False, return_tensors="pt")
        inputs = {name: encoded[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            tokens_BT = self._model.generate(
                **inputs,
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=self._tokenizer.pad_token_id,
                temperature=None,
                top_p=None,
                top_k=None,
            )
        text: str = self._tokenizer.decode(tokens_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip()


def main(arguments: list[str]) -> int:
    """Serves until stdin ends. Exit status 1, after one `failed` line, if the model or the adapter cannot be opened."""
    parser = argparse.ArgumentParser(prog="python -m training.adapter.chat_process")
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    chosen = parser.parse_args(arguments)
    say = own_stdout()
    try:
        pair = Pair(chosen.model, chosen.adapter, chosen.max_new_tokens)
    except TrainingFailed as failed:
        say({"kind": "failed", "message": failed.message, "hint": failed.hint})
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        # PEFT's message for an adapter of another model, or torch's for a full GPU.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say({"kind": "failed", "message": f"the adapter cannot be opened on this model: {first}", "hint": None})
        return 1
    say({"kind": "ready"})
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("forget"):
            pair.forget()
        else:
            pair.ask(str(order["question"]), say)
    return 0


def _spec(model_dir: Path, device: str, folder: ModelFolder) -> JobSpec:
    """Returns the part of a spec that loading a model reads. Nothing is trained or written."""
    nowhere = Path(os.devnull)
    return JobSpec(
        job_id="chat",
        base_model=model_dir.name,
        model_path=model_dir,
        dataset_path=nowhere,
        work_dir=nowhere,
        checkpoint_dir=nowhere,
        output_dir=nowhere,
        hyperparameters=Hyperparameters(),
        device="cuda" if device == "cuda" else "cpu",
        # 4 bits fit on the GPU that trained it; on a CPU, unpacking them for every token takes minutes: only where
        # nothing else is kept.
        quantize=device == "cuda" or folder.kept_copy is not None,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
