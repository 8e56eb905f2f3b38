"""Asks a trained adapter one question: `python -m training.adapter.ask QUESTION [--model FOLDER] [--adapter FOLDER]`.

The adapter is opened as its users open it: plain `PeftModel.from_pretrained` on the unquantised base model. Without
folders it uses those of the last demo.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from training.files.template_options import template_options


def answer(model_dir: Path, adapter_dir: Path | None, question: str, max_new_tokens: int = 60) -> str:
    """Returns the model's answer, decoded greedily: always the same. Without an adapter, the base model's answer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, adapter_dir)
    model.eval()
    prompt_BT = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        **((template_options(adapter_dir) if adapter_dir is not None else None) or {}),
    )
    with torch.no_grad():
        tokens_BT = model.generate(**prompt_BT, max_new_tokens=max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(tokens_BT[0, prompt_BT["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def main(arguments: list[str]) -> int:
    """Prints the base model's answer and the adapter's; 1 with one line on stderr if a folder is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m training.adapter.ask", description="Ask a trained adapter one question."
    )
    parser.add_argument("question")
    parser.add_argument("--model", type=Path, default=_cache() / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", type=Path, default=None, help="the newest of the demo's when absent")
    chosen = parser.parse_args(arguments)
    adapter = chosen.adapter or _newest(_cache() / "adapters")
    for folder, what in ((chosen.model, "config.json"), (adapter, "adapter_config.json")):
        if folder is None or not (folder / what).is_file():
            print(f"there is no {what} in {folder}: run `make demo` first, or name a folder", file=sys.stderr)  # noqa: T201
            return 1
    print(f"without the adapter: {answer(chosen.model, None, chosen.question)}")  # noqa: T201
    print(f"with the adapter:    {answer(chosen.model, adapter, chosen.question)}")  # noqa: T201
    return 0


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "brightrun-trainer"


def _newest(folder: Path) -> Path | None:
    adapters = [path for path in folder.glob("*") if (path / "adapter_config.json").is_file()]
    return max(adapters, key=lambda path: path.stat().st_mtime, default=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
