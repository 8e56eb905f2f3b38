"""A large adapter is never in memory, also when its upload is cut at every chunk."""

from __future__ import annotations

import pytest

from benchmarks.upload_memory import measure


@pytest.mark.system
def test_a_large_upload_takes_little_memory_and_survives_a_cut_at_every_chunk() -> None:
    row = measure(megabytes=100, cuts=15)
    assert row.whole
    assert row.cuts == 15
    assert row.extra_mib < 50, row
