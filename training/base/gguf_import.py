"""Turns one GGUF file into the safetensors folder that the trainer loads.

    python -m training.base.gguf_import SOURCE.gguf TARGET

A separate process, because it needs torch and its caller (the demo) must not load it. TARGET appears complete or not
at all: it is written to a temporary folder, read back, and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from training.files.durable_files import sha256_of

# Written last, beside the weights: the size and hash of every file. The caller checks them before each use.
MANIFEST = "import.json"


class ImportFailed(Exception):
    """The GGUF file cannot be turned into a model; the message says which file and what to do."""


def import_gguf(source: Path, target: Path) -> None:
    """Writes the model in `source` (a .gguf file) to the folder `target`, as bfloat16 safetensors with its tokenizer.

    Raises ImportFailed if the source is missing, or if reading the result back gives something else.
    """
    if not source.is_file():
        raise ImportFailed(f"there is no GGUF file at {source}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Named after this process, so that a caller who kills it knows which folder to remove.
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-{os.getpid()}-", dir=target.parent))
    try:
        _convert(source, partial)
        _write_manifest(source, partial)
        _open_to_readers(partial)
        if target.exists():
            shutil.rmtree(target)
        # Another process may have finished first; its folder is just as good.
        if not _renamed(partial, target) and not (target / MANIFEST).is_file():
            raise ImportFailed(f"{target} is in the way: remove it and try again")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if not tokenizer.chat_template:
        raise ImportFailed(f"{source.name} carries no chat template: take an Instruct model")
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        # Without this, transformers keeps the GGUF quantisation and save_pretrained fails.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    _, report = reloaded
    # transformers fills missing tensors with random numbers without raising an error.
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ImportFailed(
            f"{source.name} was converted incompletely: {sorted(report['missing_keys'])[:5]} are missing"
        )
    if len(AutoTokenizer.from_pretrained(folder)) != len(tokenizer):
        raise ImportFailed(f"the tokenizer of {source.name} does not read back whole")


def _write_manifest(source: Path, folder: Path) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    manifest = {"source": source.name, "source_sha256": sha256_of(source), "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _open_to_readers(folder: Path) -> None:
    # mkdtemp and safetensors make files private; a model is no secret, and another user may train from it.
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)


def _renamed(partial: Path, target: Path) -> bool:
    try:
        os.rename(partial, target)  # noqa: PTH104 - the atomic step, named as the system calls it
    except OSError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """Exit status 0 if TARGET is complete, 1 with one line on stderr if not, 2 for wrong arguments."""
    if len(arguments) != 2:
        print("usage: python -m training.base.gguf_import SOURCE.gguf TARGET_FOLDER", file=sys.stderr)  # noqa: T201
        return 2
    try:
        import_gguf(Path(arguments[0]), Path(arguments[1]))
    except (ImportFailed, OSError, ValueError) as error:
        print(f"gguf_import: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
