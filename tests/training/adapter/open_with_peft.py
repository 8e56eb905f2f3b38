"""Runs beside other versions of the libraries: opens adapters with plain PEFT and says what came of it.

A JSON request on stdin: `into`, a folder for the logits, and `adapters`: `{name: {"base": …, "adapter": …}}`. A JSON
object on stdout, an entry for each name: `error`, or `unlike` (stored tensors that were not loaded as they are),
`added` (tensors of LoRA that are not stored) and `prompt` (the tokens of a chat, by the tokenizer beside the adapter).
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

CHAT = [{"role": "user", "content": "What colour is the cat?"}]


def main() -> None:
    request = json.loads(sys.stdin.read())
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for name, folders in request["adapters"].items():
        try:
            found[name] = opened(name, Path(folders["base"]), Path(folders["adapter"]), Path(request["into"]))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))


def opened(name: str, base: Path, adapter: Path, into: Path) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32), adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    loaded = {path.replace(".default", ""): value for path, value in model.named_parameters() if "lora_" in path}
    with torch.no_grad():
        save_file({"logits": model.eval()(torch.tensor(probe())).logits.contiguous()}, into / f"{name}.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    return {
        "unlike": sorted(path for path, value in stored.items() if not same(loaded.get(path), value)),
        "added": sorted(loaded.keys() - stored.keys()),
        "prompt": list(tokenizer(tokenizer.apply_chat_template(CHAT, tokenize=False)).input_ids),
    }


def same(one: Any, other: Any) -> bool:
    return one is not None and one.shape == other.shape and bool((one == other).all())


def probe() -> list[list[int]]:
    """Two texts of 40 tokens, of which tiny models know each."""
    return [[3 + (7 * place) % 500 for place in range(40)], [3 + (11 * place * place) % 500 for place in range(40)]]


if __name__ == "__main__":
    main()
