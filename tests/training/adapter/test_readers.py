"""What an adapter needs of the libraries that open it."""

from __future__ import annotations

import pytest

from tests.training.adapter.readers_page import PAGE, written
from training.adapter.readers import peft_floor


@pytest.mark.parametrize(
    ("config", "floor"),
    [
        ({"target_modules": ["q_proj"]}, "0.12"),
        ({"target_modules": ["q_proj"], "exclude_modules": None, "target_parameters": None}, "0.12"),
        ({"target_modules": ["q_proj"], "exclude_modules": r"(?:.*\.)?(?:vision_tower)\..*"}, "0.14"),
        ({"target_modules": [], "target_parameters": ["mlp.shared_expert.down_proj.weight"]}, "0.17"),
        ({"exclude_modules": "x", "target_parameters": ["self_attn.q_proj.weight"]}, "0.17"),
    ],
)
def test_the_floor_of_peft_is_that_of_the_newest_key_in_use(config: dict[str, object], floor: str) -> None:
    assert peft_floor(config) == floor


def test_the_page_has_the_table_that_is_tested() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "run `python -m tests.training.adapter.readers_page`"
