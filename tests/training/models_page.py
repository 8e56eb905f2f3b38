"""The table of docs/reference/models.md, made from the code: `python -m tests.training.models_page` writes it."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from tests.paths import ROOT
from tests.real_shapes import REAL_SHAPES, WITHOUT_A_CLASS, skeleton, small_config
from training.attention.choice import choose_packed_attention
from training.base.sequence_packing import why_not_packed
from training.files.adapter_size import ADAPTER_BYTES, adapter_parameters
from training.files.published_form import fault_of_form
from training.preflight.estimate import model_bytes
from training.spec import Hyperparameters

PAGE = ROOT / "docs" / "reference" / "models.md"
_BORDERS = re.compile(r"(<!-- models -->\n)(.*?)(<!-- /models -->)", re.DOTALL)
# The library has no experts of this kind that can be packed, or no text model of it.
_REFUSED = {
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": "refused: its experts do not become 4-bit",
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": "refused: its language model cannot be loaded by itself",
}


def packs(name: str, dtype: torch.dtype) -> bool:
    """Runs a small model of this architecture, as a job runs its own."""
    values = small_config(name)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    torch.manual_seed(0)
    model = kind._from_config(config if kind.config_class is type(config) else config.get_text_config(), dtype=dtype)
    choose_packed_attention(model, ())
    return why_not_packed(model) is None


class _OnMeta:
    """Stands for a model's folder: its tensors are those of the model itself."""

    def __init__(self, model: Any) -> None:
        self._shapes = [(path, tuple(parameter.shape)) for path, parameter in model.named_parameters()]

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        return self._shapes


def row(name: str, *, is_packed: bool | None) -> str:
    quantised = fault_of_form(REAL_SHAPES[name], name)
    verdict = _REFUSED.get(name) or ("trains" if is_packed else "trains without packing")
    if quantised is not None:
        form = quantised.partition("published in ")[2].partition(", and")[0]
        verdict = f"refused: published in {form}" + (
            "" if name in WITHOUT_A_CLASS else f"; a copy in 16 bits {verdict}"
        )
    if name in WITHOUT_A_CLASS or name in _REFUSED:
        return f"| `{name}` | {verdict} | – | – | – |"
    shapes = _OnMeta(skeleton(name))
    size = model_bytes(cast("Any", shapes), quantize=True, compute_type="bfloat16") / 2**30
    adapter = adapter_parameters(shapes.tensors(), Hyperparameters(lora_rank=16))
    return f"| `{name}` | {verdict} | {size:.1f} GiB | {adapter / 1e6:.1f} M | {adapter * ADAPTER_BYTES / 1e6:.0f} MB |"


def rows_on_the_page() -> dict[str, str]:
    found = _BORDERS.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    lines = [line for line in found[2].splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


def main() -> None:
    rows = []
    for name in REAL_SHAPES:
        tried = name not in WITHOUT_A_CLASS and name not in _REFUSED
        is_packed = tried and all(packs(name, dtype) for dtype in (torch.float32, torch.bfloat16))
        rows.append(row(name, is_packed=is_packed))
    head = (
        "| model | as published | weights in 4 bits | trained at rank 16 | adapter |\n"
        "|---|---|---|---|---|\n"
    )  # fmt: skip
    text = PAGE.read_text(encoding="utf-8")
    table = head + "\n".join(rows) + "\n"
    PAGE.write_text(_BORDERS.sub(lambda found: found[1] + table + found[3], text), encoding="utf-8")


if __name__ == "__main__":
    main()
