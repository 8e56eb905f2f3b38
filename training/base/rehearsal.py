"""Rehearses loading a base model on the meta device, from config.json and the headers of its weights alone.

Whatever would be refused when the model is loaded is refused here, in seconds: an architecture that the library does
not know or that would not become 4-bit, tensors that are missing or of another shape. What else a job asks of a model
can be asked of the one that is left, which has no weights.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from training.base.architecture import Architecture, architecture_of
from training.base.load import Wanted, cannot_be_loaded, is_packed_on_disk, refuse_missing
from training.files.model_folder import ModelFolder
from training.files.module_names import UNQUANTISED_MODULES
from training.quantization.experts import EXPERTS_FUNCTION, Nf4Config, Nf4Quantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_META = torch.device("meta")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Rehearsal:
    """The base model as it will be loaded, on the meta device."""

    architecture: Architecture
    model: PreTrainedModel


def rehearse_loading(wanted: Wanted, folder: ModelFolder) -> Rehearsal:
    """Makes the model without its weights, as loading does.

    Raises TrainingFailed: model_unsupported, or model_incomplete with the names of missing tensors."""
    architecture = architecture_of(folder, wanted.base_model)
    options = {"experts_implementation": EXPERTS_FUNCTION} if wanted.quantize else {}
    if folder.kept_copy is not None or is_packed_on_disk(wanted, folder):
        # Its tensors were all there then. Naming 75,000 of them again would take seconds.
        model = architecture.without_weights(**options)
    else:
        model = _load_headers(wanted, folder, architecture, options)
    if wanted.quantize:
        settings = Nf4Config(torch.bfloat16, list(UNQUANTISED_MODULES))
        # It refuses what would stay in 16 bits.
        Nf4Quantizer(settings, pre_quantized=False).preprocess_model(model, device_map={"": _META})
    return Rehearsal(architecture, model)


def _load_headers(
    wanted: Wanted, folder: ModelFolder, architecture: Architecture, options: dict[str, Any]
) -> PreTrainedModel:
    """Lets the library match the tensors in the files with the model's, as when it loads them."""
    if gone := sorted(_missing_experts(name for name, _ in folder.tensors())):
        refuse_missing({"missing_keys": gone}, wanted.base_model)
    shapes = {name: torch.empty(shape, dtype=torch.bfloat16, device=_META) for name, shape in folder.tensors()}
    try:
        model: PreTrainedModel
        model, report = architecture.model_class.from_pretrained(
            None,
            config=architecture.config,
            state_dict=shapes,
            dtype=torch.bfloat16,
            device_map={"": _META},
            output_loading_info=True,
            # Otherwise the library raises, and names none of them.
            ignore_mismatched_sizes=True,
            **options,
        )
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise cannot_be_loaded(wanted.base_model, error) from error
    refuse_missing(report, wanted.base_model)
    return model


def _missing_experts(names: Iterable[str]) -> Iterator[str]:
    """Finds single experts that other layers have. The library fails to fuse the others, and names none."""
    numbers: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for name in names:
        if (found := _EXPERT.fullmatch(name)) is not None:
            numbers[found[1], found[3]].add(int(found[2]))
    everywhere = set().union(*numbers.values())
    for (before, after), here in numbers.items():
        yield from (f"{before}{number}{after}" for number in sorted(everywhere - here))
