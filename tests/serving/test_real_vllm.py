"""Real jobs, served by a real vLLM: told of their adapters by a real daemon, and by the command of the model card."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.command import CommandLine
from tests.daemon_process import REAL, eventually
from tests.lifecycle.queue import Queue
from tests.serving.vllm_server import VllmServer
from tests.tiny_models import conversation, make_model
from training.quick_imports import quick_imports

# As the trainer imports it, wherever the tests begin.
with quick_imports():
    from peft import PeftModel

MODEL = "acme/tiny"
KEY = "endpoint-key-of-the-operator"
PROMPT = [5, 17, 33, 6, 9]
pytestmark = [pytest.mark.system, pytest.mark.timeout(1800)]


@pytest.fixture
def models(queue: Queue) -> Path:
    folder = queue.folder / "models"
    make_model(folder / MODEL, "qwen3")
    return folder


@pytest.fixture
def server(models: Path) -> Iterator[VllmServer]:
    """In the folder of the models a model's path is its name."""
    words = ["vllm", "serve", MODEL, "--enable-lora", "--max-lora-rank", "32", "--max-loras", "2"]
    with VllmServer(words, models, key=KEY) as running:
        yield running


def insert(queue: Queue, **asked: object) -> UUID:
    chosen = {"base_model": MODEL, "num_epochs": 2, "lora_rank": 24, "learning_rate": 2e-2, **asked}
    return queue.insert(lines=[json.dumps(conversation(number)) for number in range(8)], hyperparameters=chosen)


def probability(base: Path, adapter: Path) -> float:
    """What our own libraries find for the first token."""
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([PROMPT])).logits[0, -1]
    return float(logits.float().log_softmax(-1).max())


def test_a_job_is_deployed_when_vllm_has_answered_with_it(queue: Queue, models: Path, server: VllmServer) -> None:
    def ended(job: UUID) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            rows = queue.select("SELECT * FROM training_deliveries WHERE job_id = %s AND kind = 'endpoint'", job)
            return rows[0] if rows and rows[0]["state"] in ("done", "failed") else None

        return eventually(look, seconds=300, why=daemon.tail)

    with queue.daemon(
        queue.folder, command=REAL, endpoint_url=server.url, endpoint_key=KEY, endpoint_max_rank=32,
        endpoint_dir=queue.folder / "shared", storage_dir=queue.folder / "storage",
    ) as daemon:  # fmt: skip
        first = insert(queue, deploy="support")
        queue.wait_for(first, "completed", seconds=180)
        done = ended(first)
        assert done["state"] == "done", done
        row = queue.row(first)
        assert row["deployed_at"] is not None and row["deployed_as"] == "support"
        second = insert(queue, deploy="support", seed=7)
        assert ended(second)["result"]["superseded"] == [str(first)]
        large = insert(queue, lora_rank=64, deploy=True)
        eventually(lambda: queue.row(large)["status"] == "failed", seconds=60, why=daemon.tail)
        assert "lora_rank of 64 is above the endpoint's 32" in queue.row(large)["error_message"]

    served = {model["id"]: model for model in server.get("/v1/models")["data"]}
    assert served.keys() == {MODEL, "support", str(second)}
    assert served["support"]["root"] == str(queue.folder / "shared" / str(second))
    token, found = server.first_token("support", PROMPT)
    assert (token, found) != server.first_token(MODEL, PROMPT)
    ours = probability(models / MODEL, queue.folder / "shared" / str(second))
    assert math.isclose(found, ours, abs_tol=0.1), (found, ours)

    # By the card's own command, on a server that starts with the adapter.
    storage = {"TRAINER_STORAGE": "folder", "TRAINER_STORAGE_DIR": str(queue.folder / "storage")}
    cli = CommandLine(queue.folder, DATABASE_URL=queue.dsn, TRAINER_WORK_DIR=str(queue.folder / "jobs"), **storage)
    cli.ok("download", second, "--to", "adapter")
    card = (queue.folder / "adapter" / "README.md").read_text()
    [command] = re.findall(r"^vllm serve (?:.*\\\n)*.*$", card, re.MULTILINE)
    words = [word.replace("$PWD", str(queue.folder / "adapter")) for word in shlex.split(command.replace("\\\n", " "))]
    with VllmServer(words, models, can_be_told=False) as fresh:
        again = fresh.first_token("adapter", PROMPT)
    assert again[0] == token and math.isclose(again[1], found, abs_tol=0.05)


def test_vllm_answers_as_its_double_does(queue: Queue, models: Path, server: VllmServer) -> None:
    """What the fast tests rest on: tests/doubles/endpoint.py."""
    from peft import LoraConfig, get_peft_model

    for rank in (8, 64):
        model = AutoModelForCausalLM.from_pretrained(models / MODEL, dtype=torch.bfloat16)
        get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj"])).save_pretrained(queue.folder / f"r{rank}")

    def load(name: str, path: object, **more: object) -> tuple[int, str]:
        answer = server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})
        return answer.status_code, answer.text

    small, large = queue.folder / "r8", queue.folder / "r64"
    assert load("one", small) == (200, "Success: LoRA adapter 'one' added successfully.")
    status, said = load("one", small)
    assert status == 400 and "has already been loaded" in said
    assert load("one", small, load_inplace=True)[0] == 200
    status, said = load("large", large)
    assert status == 500 and "add_lora" in said and "LoRA rank 64 is greater than max_lora_rank 32" in said
    status, said = load("absent", queue.folder / "absent")
    assert status == 404 and "No adapter found for" in said
    status, said = load(MODEL, small)
    assert status == 400 and "conflicts with a served base model" in said
    asked = {"model": "unknown", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}
    answer = server.post("/v1/chat/completions", asked)
    assert answer.status_code == 404 and "does not exist" in answer.text
    answer = server.post("/v1/chat/completions", {**asked, "model": "one", "logprobs": True, "temperature": 0})
    assert {"token", "logprob"} <= answer.json()["choices"][0]["logprobs"]["content"][0].keys()
    [base, adapter] = server.get("/v1/models")["data"]
    assert (base["id"], base["root"], base["parent"]) == (MODEL, MODEL, None)
    assert (adapter["id"], adapter["root"], adapter["parent"]) == ("one", str(small), MODEL)
    gone = [server.post("/v1/unload_lora_adapter", {"lora_name": "one"}) for _ in range(2)]
    assert [answer.status_code for answer in gone] == [200, 404] and "cannot be found" in gone[1].text
