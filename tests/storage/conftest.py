"""The double of Supabase Storage with the adapters' bucket, and our client of it, which waits only milliseconds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from daemon.storage.supabase import SupabaseStorage
from tests.doubles.storage import SERVICE_KEY, Bucket, StorageDouble


@pytest.fixture
async def double(tmp_path: Path) -> AsyncIterator[StorageDouble]:
    async with StorageDouble(tmp_path / "double") as double:
        double.buckets["lora-models"] = Bucket()
        yield double


@pytest.fixture
async def storage(double: StorageDouble) -> AsyncIterator[SupabaseStorage]:
    storage = SupabaseStorage(double.url, SERVICE_KEY, first_wait_seconds=0.005)
    yield storage
    await storage.close()
