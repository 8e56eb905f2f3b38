"""A RunPod of one's own for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runpod_double import RunPodDouble


@pytest.fixture
def runpod() -> Iterator[RunPodDouble]:
    with RunPodDouble() as double:
        yield double
