"""Writes the front matter of a model card: what the Hugging Face hub reads of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from training.files.licence import Licence


def front_matter(
    base_model: str, licence: Licence | None, *, relation: str, library: str, tags: Sequence[str] = ()
) -> str:
    """`relation`: what the model is to its base model, in the hub's words: adapter, finetune."""
    fields: dict[str, Any] = {
        "base_model": base_model,
        "base_model_relation": relation,
        "library_name": library,
        "pipeline_tag": "text-generation",
    }
    if licence is not None:
        fields["license"] = licence.license
        if licence.license == "other":
            # Another link leads to a file beside the base model's card.
            link = licence.link if licence.link is not None and licence.link.startswith("https://") else None
            fields |= {"license_name": licence.name, "license_link": link}
    if tags:
        fields["tags"] = list(tags)
    # JSON is YAML: a value in quotes stays a string, whatever it looks like.
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value is not None]
    return "\n".join(("---", *lines, "---"))
