"""The double of Supabase Storage with the adapters' bucket, and our client of it, which waits only milliseconds."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from daemon.storage.supabase import SupabaseStorage
from tests.doubles.storage import StorageDouble
from tests.storage.real_server import SERVERS, open_storage_server


@pytest.fixture(params=SERVERS)
async def double(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StorageDouble]:
    async with open_storage_server(request, tmp_path) as double:
        double.set_bucket("lora-models")
        yield double


@pytest.fixture
async def storage(double: StorageDouble) -> AsyncIterator[SupabaseStorage]:
    storage = SupabaseStorage(double.url, double.key, first_wait_seconds=0.005)
    yield storage
    await storage.close()
