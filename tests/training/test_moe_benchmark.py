"""The benchmark of the 80B trains by the trainer's own path, and each of its sizes on the same frozen model."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import moe_80b

_SHAPE = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "full_attention_interval": 2,
}  # fmt: skip


def test_it_trains_as_a_job_does_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = moe_80b.build(2, 4, "cpu", **_SHAPE)
    names = [name for name, _ in model.named_parameters()]
    arguments = argparse.Namespace(conversations=2, steps=1, rank=4, device="cpu")
    losses = []
    for number in range(2):
        clock = moe_80b.Stopwatch("cpu")
        moe_80b.train(model, 64, arguments, tmp_path / str(number), clock)
        losses.append(clock.losses)
        assert clock.seconds_a_step > 0
        assert (tmp_path / str(number) / "adapter" / "adapter_model.safetensors").is_file()
        moe_80b.remove_adapter(model)
        assert [name for name, _ in model.named_parameters()] == names
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    assert all(torch.isfinite(torch.tensor(losses[0])))
