"""A process that uploads one file to Storage: `URL KEY FILE NAME SHA256 RESUME_FOLDER`. 3: not now."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from daemon.errors import JobError
from daemon.storage.supabase import SupabaseStorage


async def upload(url: str, key: str, file: str, name: str, sha256: str, folder: str) -> int:
    storage = SupabaseStorage(url, key, first_wait_seconds=0.02)
    try:
        stored = await storage.upload(Path(file), name, sha256=sha256, resume_dir=Path(folder))
    except JobError as error:
        print(error)
        return 3
    finally:
        await storage.close()
    print(stored)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(upload(*sys.argv[1:])))
