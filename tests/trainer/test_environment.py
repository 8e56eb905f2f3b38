"""What a trainer's process inherits: names on a list, and no secret. Real children are looked at in test_gpu_slots."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.cli.data import trainer_process
from daemon.host.gpus import Gpu
from daemon.trainer.environment import child_environment

_SECRETS = {
    "DATABASE_URL": "x", "SUPABASE_SERVICE_ROLE_KEY": "x", "HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x",
    "WANDB_API_KEY": "x", "OPENAI_API_KEY": "x", "NCCL_AUTH_TOKEN": "x", "CUDA_REGISTRY_PASSWORD": "x",
}  # fmt: skip


def test_kernels_are_kept_on_the_volume_unless_the_operator_says_where(tmp_path: Path) -> None:
    ours = child_environment({}, [], tmp_path)
    assert ours["TRITON_CACHE_DIR"] == str(tmp_path / ".kernels" / "triton")
    assert ours["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / ".kernels" / "inductor")
    assert child_environment({"TRITON_CACHE_DIR": "/fast"}, [], tmp_path)["TRITON_CACHE_DIR"] == "/fast"
    # Triton's own folder has its cache below it.
    home = child_environment({"TRITON_HOME": "/fast"}, [], tmp_path)
    assert home["TRITON_HOME"] == "/fast" and "TRITON_CACHE_DIR" not in home
    assert "TRITON_CACHE_DIR" not in child_environment({}, [])


def test_an_operators_allocator_settings_win_under_either_name() -> None:
    assert child_environment({}, [])["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    older = child_environment({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, [])
    assert older["PYTORCH_CUDA_ALLOC_CONF"] == "backend:cudaMallocAsync" and "PYTORCH_ALLOC_CONF" not in older
    assert child_environment({"PYTORCH_ALLOC_CONF": "x:1"}, [])["PYTORCH_ALLOC_CONF"] == "x:1"


def test_a_commands_trainer_inherits_no_more_than_a_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (_SECRETS | {"TRITON_PTXAS_PATH": "/opt/ptxas", "CUDA_VISIBLE_DEVICES": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(trainer_process, "find_gpus", lambda: (Gpu(0, "NVIDIA L4", 22.5, "GPU-77"),))
    found = trainer_process.trainer_environment()
    assert not found.keys() & _SECRETS.keys()
    assert (found["TRITON_PTXAS_PATH"], found["CUDA_VISIBLE_DEVICES"]) == ("/opt/ptxas", "GPU-77")
    assert found["HF_HUB_OFFLINE"] == "1"
