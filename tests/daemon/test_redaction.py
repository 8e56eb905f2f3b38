"""What a job's owner reads names no folder of the host, whatever the folder is called and however it is written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from daemon.redaction import Redaction

MODELS, WORK = Path("/srv/Modèle (n° 1) o'brien"), Path("/srv/wörk")
REDACTION = Redaction(
    (
        (MODELS, "the models folder"),
        (WORK, "the work folder"),
        (Path("/srv"), "the home folder"),
        (Path("/opt/app"), ""),
    ),
    ("gpu-7", "trainer"),
)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"{MODELS} is gone.", "the models folder is gone."),
        (str(FileNotFoundError(2, "No such file", f"{MODELS}/acme/tiny/tokenizer.json")),
         "[Errno 2] No such file: tokenizer.json in the models folder"),
        (f"read {json.dumps(str(MODELS))}", "read the models folder"),
        (f"read {str(WORK)!a}", "read the work folder"),
        (f"file://{quote(str(WORK))}/x.bin", "file://x.bin in the work folder"),
        (f"the volume of {WORK}/3f2a/attempts/e1/dataset is full", "the volume of the work folder is full"),
        (f"see {WORK}/log.txt.", "see log.txt in the work folder."),
        ("/srv/other is read-only", "the home folder is read-only"),
        ("/srv-2/x/y.json", "y.json in a folder of the host"),
        ("/dev/shm/torch_1 cannot be opened: /usr/lib/x86_64/libcuda.so",
         "a folder of the host cannot be opened: libcuda.so in a folder of the host"),
        ("rank 0 at gpu-7:29500 stopped; the trainer goes on", "rank 0 at the host:29500 stopped; the trainer goes on"),
    ],
)  # fmt: skip
def test_folders_and_names_of_the_host_are_replaced_by_words(text: str, told: str) -> None:
    assert REDACTION.text(text) == told


@pytest.mark.parametrize(
    "text",
    [
        "the dataset lora-datasets/3f2a/data.jsonl is not in storage",
        "https://files.example.com/srv/wörk/data.jsonl answers 404; http://10.0.0.1:8000/tmp/x refuses",
        "Qwen/Qwen3-8B and/or 3/4 of it, 12 tokens/s, <think></think>, {% if a/b %}, /status, 27/11/2026",
        "stored as lora-models/adapters/x.tar.gz",
    ],
)
def test_addresses_and_names_that_are_no_paths_stay(text: str) -> None:
    assert REDACTION.text(text) == text


def test_a_stack_names_each_file_inside_its_package_and_no_host() -> None:
    stack = (
        'Traceback (most recent call last):\n  File "/opt/app/training/recipe.py", line 7, in train\n'
        '  File "/home/ann/my venv/lib/python3.12/site-packages/torch/nn/modules/module.py", line 9\n'
        '  File "/usr/lib/python3.12/json/decoder.py", line 3\n'
        f"OSError: {MODELS}/acme\n/usr/lib/python3/dist-packages/x/y.py:3: UserWarning: trainer gpu-7"
    )
    assert REDACTION.stack(stack) == (
        'Traceback (most recent call last):\n  File "training/recipe.py", line 7, in train\n'
        '  File "torch/nn/modules/module.py", line 9\n'
        '  File "json/decoder.py", line 3\n'
        "OSError: the models folder\nx/y.py:3: UserWarning: the host the host"
    )


def test_json_keeps_its_shape_and_numbers() -> None:
    value: dict[str, Any] = {"step": 3, "loss": 0.5, "of": [f"{WORK}/a.log", None, True], "nested": {"x": "y"}}
    told = {"step": 3, "loss": 0.5, "of": ["a.log in the work folder", None, True], "nested": {"x": "y"}}
    assert REDACTION.value(value) == told


def test_a_link_and_its_goal_are_the_same_folder(tmp_path: Path) -> None:
    goal, link = tmp_path / "the volume", tmp_path / "link"
    goal.mkdir()
    link.symlink_to(goal)
    redaction = Redaction(((link, "the work folder"),))
    assert redaction.text(f"{link}/x and {goal}/y are there") == "the work folder and the work folder are there"


@pytest.mark.parametrize("text", ["/a" * 500_000, "'" + "/a" * 500_000, 'File "' + "/a" * 500_000, "'/" * 300_000])
def test_a_text_full_of_slashes_takes_no_longer_than_its_length(text: str) -> None:
    begun = time.process_time()
    REDACTION.stack(text)
    assert time.process_time() - begun < 20, "linear: about a second"
