"""Bad input ends with a code and a helpful sentence: never with a traceback, never silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.preflight.bad_input import DATASETS, ROWS
from training.data.formats.read_dataset import read_conversations
from training.failures import TrainingFailed
from training.preflight.check import check_dataset
from training.spec import SpecInvalid, parse_row


@pytest.mark.parametrize("name", DATASETS)
def test_a_bad_dataset_is_refused_with_place_and_reason(name: str, tmp_path: Path) -> None:
    content, words = DATASETS[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(TrainingFailed) as refused:
        read_conversations(path)
    assert refused.value.code == "dataset_invalid"
    assert all(word in refused.value.message for word in words), refused.value.message
    assert refused.value.hint and not refused.value.transient
    assert "Traceback" not in refused.value.message and len(refused.value.message) < 2000
    verdict = check_dataset(path)
    assert not verdict.ok and verdict.errors[0]["message"] == refused.value.message


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("csv", "this is not JSONL: give one JSON object a line"),
        ("one broken line", "correct or remove the named lines"),
    ],
)
def test_a_file_without_any_json_is_told_what_to_be_and_not_to_mend_each_line(
    name: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(DATASETS[name][0])
    with pytest.raises(TrainingFailed) as refused:
        read_conversations(path)
    assert (refused.value.hint or "").startswith(hint)


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_names_every_wrong_field(name: str) -> None:
    row = ROWS[name]
    with pytest.raises(SpecInvalid) as refused:
        parse_row(row.hyperparameters, row.gpu_config if row.gpu_config is not None else {})
    assert {fault.field for fault in refused.value.faults} == set(row.fields)
    assert all(fault.message for fault in refused.value.faults)


def test_the_library_is_as_large_as_promised() -> None:
    assert len(DATASETS) + len(ROWS) >= 60


def test_a_dataset_that_is_not_there_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed) as refused:
        read_conversations(tmp_path / "gone.jsonl")
    assert refused.value.code == "dataset_unreachable" and refused.value.transient
    assert refused.value.hint == "check the dataset URL and submit again"
