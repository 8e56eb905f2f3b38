"""The whole way with real parts: a real training, a real merge in a process of its own, and its download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from tests.cli.command import CommandLine
from tests.daemon_process import REAL, eventually
from tests.lifecycle.queue import Queue
from tests.tiny_models import conversation, make_model
from training.quick_imports import quick_imports

# As the trainer imports it, wherever the tests begin.
with quick_imports():
    from peft import PeftModel

MODEL = "acme/tiny"
TOKENS = torch.tensor([[5, 17, 33, 6, 9]])
pytestmark = [pytest.mark.timeout(300), pytest.mark.system]


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS).logits
    return found


def test_a_job_that_asks_for_exports_gets_them(queue: Queue, tmp_path: Path) -> None:
    base = make_model(tmp_path / "models" / MODEL, "qwen3")
    asked = {"base_model": MODEL, "num_epochs": 2, "lora_rank": 4, "learning_rate": 2e-2, "exports": ["merged", "gguf"]}
    job = queue.insert(lines=[json.dumps(conversation(number)) for number in range(8)], hyperparameters=asked)
    cli = CommandLine(
        tmp_path,
        DATABASE_URL=queue.dsn,
        TRAINER_STORAGE="folder",
        TRAINER_STORAGE_DIR=str(tmp_path / "storage"),
        TRAINER_WORK_DIR=str(tmp_path / "jobs"),
    )

    def ended() -> dict[str, dict[str, Any]] | None:
        rows = queue.select("SELECT * FROM training_deliveries WHERE job_id = %s", job)
        all_ended = len(rows) == 2 and all(row["state"] in ("done", "failed") for row in rows)
        return {row["kind"]: row for row in rows} if all_ended else None

    with queue.daemon(tmp_path, command=REAL) as daemon:
        queue.wait_for(job, "completed", seconds=120)
        rows = eventually(ended, seconds=120, why=daemon.tail)
    row, gguf = rows["merged"], rows["gguf"]
    assert (row["state"], gguf["state"]) == ("done", "done"), rows
    assert str(tmp_path) not in json.dumps(gguf["result"])
    assert row["result"]["is_dequantised"] is False and str(tmp_path) not in json.dumps(row["result"])
    cli.ok("download", job, "--to", "adapter")
    said = cli.ok("download", job, "--export", "merged", "--to", "merged", "--json").lines[0]
    assert said["bytes"] == row["result"]["bytes"] and set(said["manifest"]["files"]) == set(row["result"]["files"])
    merged = logits(tmp_path / "merged")
    assert torch.allclose(merged, logits(base, tmp_path / "adapter"), atol=0.05)
    assert not torch.allclose(merged, logits(base), atol=0.05)
    assert f"merged    lora-models/adapters/{job}/merged" in cli.ok("show", job).out

    # Changed in storage: refused, and nothing is left that looks like a model.
    stored = tmp_path / "storage" / row["result"]["path"] / "config.json"
    stored.write_bytes(stored.read_bytes() + b" ")
    refused = cli.run("download", job, "--export", "merged", "--to", "again")
    assert refused.status == 1 and "config.json is not the one" in refused.err
    assert not (tmp_path / "again").exists()
    stored.write_bytes(stored.read_bytes()[:-1])
    cli.ok("download", job, "--export", "merged", "--to", "again")
    assert "has no export transformers4" in cli.run("download", job, "--export", "transformers4").err

    cli.ok("download", job, "--export", "gguf", "--to", "gguf")
    fields = GGUFReader(tmp_path / "gguf" / "adapter.gguf").fields
    assert (fields["general.type"].contents(), fields["adapter.type"].contents()) == ("adapter", "lora")
