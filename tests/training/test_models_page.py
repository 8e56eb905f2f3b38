"""The page of base models says what the code decides."""

from __future__ import annotations

import pytest
import torch

from tests.real_shapes import REAL_SHAPES
from tests.training.models_page import packs, row, rows_on_the_page
from tests.training.test_real_shapes import LOADABLE, REFUSED


def test_the_page_names_each_model_with_what_is_decided_about_it() -> None:
    found = rows_on_the_page()
    assert list(found) == list(REAL_SHAPES)
    for name, line in found.items():
        assert line == row(name, is_packed="without packing" not in line), "run `python -m tests.training.models_page`"
        assert ("refused: " in line) == (name in REFUSED)


@pytest.mark.system
@pytest.mark.parametrize("name", LOADABLE)
def test_what_the_page_says_of_packing_is_seen_in_both_types(name: str) -> None:
    said = "without packing" not in rows_on_the_page()[name]
    assert [packs(name, dtype) for dtype in (torch.float32, torch.bfloat16)] == [said, said]
