"""Reads how an adapter is asked: what its base model's chat template must be told, as the manifest beside it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def template_options(adapter_dir: Path) -> dict[str, Any] | None:
    """Returns the manifest's `serving.chat_template_kwargs`; None if no manifest lies beside it, or an older one."""
    try:
        manifest = json.loads((adapter_dir / "manifest.json").read_text(encoding="utf-8"))
        found = manifest["serving"]["chat_template_kwargs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(found) if isinstance(found, dict) else None
