"""Saves the finished adapter as a folder that plain PEFT opens: complete or absent, with nothing pickled in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from training.adapter.describe import Described, Describer
from training.adapter.openable_config import openable_config
from training.adapter.tokenizer_files import write_tokenizer
from training.files.durable_files import beside, put_in_place
from training.results.model_card import CARD
from training.spec import JobSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

CONFIG = "adapter_config.json"


def save_adapter(
    spec: JobSpec,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    extras: tuple[Path, ...],
    describe: Describer,
) -> Described:
    """Writes weights, config, tokenizer, template, model card and `extras` (files) to a temporary folder, then renames
    it to spec.output_dir. An existing one is replaced.
    """
    with beside(spec.output_dir) as staging:
        staging.mkdir(parents=True)
        model.save_pretrained(staging, safe_serialization=True, save_embedding_layers=False)
        config = json.dumps(openable_config(model, spec.base_model, spec.model_revision), indent=2, sort_keys=True)
        (staging / CONFIG).write_text(config + "\n", encoding="utf-8")
        write_tokenizer(spec.model_path, tokenizer, staging)
        for source in extras:
            shutil.copyfile(source, staging / source.name)
        described = describe(json.loads(config))
        # In place of PEFT's, which is a form to fill in.
        (staging / CARD).write_text(described.card, encoding="utf-8")
        put_in_place(staging, spec.output_dir)
    return described
