"""A process that publishes one adapter, as a daemon does at the end of a job: `URL KEY FOLDER WEIGHT_BYTES`."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path

from daemon.storage.publish import publish_adapter
from daemon.storage.supabase import SupabaseStorage

JOB = "99999999-2222-4333-8444-555555555555"


async def publish(url: str, key: str, folder: Path, weight_bytes: int) -> None:
    adapter = folder / "adapter"
    if not adapter.exists():
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(random.Random(1).randbytes(weight_bytes))
        (adapter / "adapter_config.json").write_text("{}")
    storage = SupabaseStorage(url, key, first_wait_seconds=0.05)
    await publish_adapter(storage, adapter, JOB, 1, {"base_model": "acme/small"}, folder / "work")
    await storage.close()


if __name__ == "__main__":
    asyncio.run(publish(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
