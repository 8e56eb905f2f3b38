"""Reads how an adapter is asked: what its base model's chat template must be told, as the manifest beside it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def template_options(adapter_dir: Path) -> dict[str, Any]:
    """Returns the manifest's `serving.chat_template_kwargs`; none where an older manifest, or none, lies beside it."""
    try:
        found = json.loads((adapter_dir / "manifest.json").read_text(encoding="utf-8"))["serving"][
            "chat_template_kwargs"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(found) if isinstance(found, dict) else {}
