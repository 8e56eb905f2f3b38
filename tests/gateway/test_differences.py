"""A repeated submit is compared with the job's row by what it means, in whatever spelling."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.gateway.differences import notice_of
from daemon.gateway.schemas import Submission

ROW: dict[str, Any] = {
    "hyperparameters": {"base_model": "acme/tiny", "epochs": 3, "rank": 16, "learning_rate": 2e-4},
    "gpu_config": {"type": "H100", "count": 1},
    "dataset_url": None,
    "storage_bucket": "lora-datasets",
    "storage_path": "3f2a/my data.jsonl",
    "callback_url": None,
}
URL = "https://files.example.com/d.jsonl?token="


@pytest.mark.parametrize(
    ("wish", "row"),
    [
        ({}, {}),
        ({"hyperparameters": {"num_epochs": 3, "lora_rank": 16, "alpha": 32}, "gpu_config": {"num_gpus": 1}}, {}),
        ({"gpu_config": {"gpu_type": "h100", "cost_per_gpu_hour": None}}, {}),
        ({"dataset_url": "https://abc.supabase.co/object/sign/lora-datasets/3f2a/my%20data.jsonl?token=t"}, {}),
        ({"dataset_url": URL + "new"}, {"dataset_url": URL + "old"}),
        ({"callback_url": "https://app.example.com/x"}, {"callback_url": "https://app.example.com/x"}),
        ({}, {"hyperparameters": {"rank": -1}}),
        ({"hyperparameters": {"rank": -1}, "gpu_config": {}}, {"hyperparameters": {"rank": -1}, "gpu_config": {}}),
    ],
)  # fmt: skip
def test_what_says_the_same_is_no_difference(wish: dict[str, Any], row: dict[str, Any]) -> None:
    assert notice_of(Submission(**wish), ROW | row) is None


@pytest.mark.parametrize(
    ("wish", "row", "words"),
    [
        ({"hyperparameters": {"lora_rank": 8}}, {}, "lora_rank is 16 there, not 8"),
        ({"hyperparameters": {"lr": 1, "learning_rate": 0.001}}, {}, "learning_rate is 0.0002 there, not 0.001"),
        ({"hyperparameters": {"base_model": "acme/other"}}, {}, "base_model is acme/tiny there, not acme/other"),
        ({"hyperparameters": {"max_length": 64}}, {}, "max_length is the default there, not 64"),
        ({"gpu_config": {"count": 2}}, {}, "num_gpus is 1 there, not 2"),
        ({"dataset_url": URL + "t"}, {}, "dataset_url is another file"),
        ({"dataset_url": URL + "t"}, {"dataset_url": "https://files.example.com/e"}, "dataset_url is another file"),
        ({"callback_url": "https://b.example/y"}, {"callback_url": "https://b.example/x"}, "callback_url is"),
        ({"hyperparameters": {"rank": -1}}, {}, "the submitted hyperparameters.rank is not valid"),
        ({"hyperparameters": {"rank": 8}}, {"hyperparameters": {"rank": -1}}, "the row's values are not valid"),
    ],
)  # fmt: skip
def test_what_differs_is_named_and_no_signature_is_shown(wish: dict[str, Any], row: dict[str, Any], words: str) -> None:
    said = notice_of(Submission(**wish), ROW | row)
    assert said is not None and words in said and "token" not in said and "the row is what runs" in said
    assert said.endswith("Change the row while it is queued, or submit without this job_id for another job.")


def test_many_differences_make_no_long_notice() -> None:
    wish = {"lora_rank": 9, "num_epochs": 9, "batch_size": 9, "seed": 9, "max_length": 99, "warmup_steps": 9,
            "weight_decay": 0.9, "base_model": "a" * 190, "target_modules": ["q" * 90] * 9}  # fmt: skip
    said = notice_of(Submission(hyperparameters=wish), ROW)
    assert said is not None and "and 3 more" in said and len(said) < 900
