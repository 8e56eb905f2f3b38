"""The engine that starts ranks works with every torch that pyproject.toml allows, and knows the options we use."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, make_dataclass
from typing import Any

import pytest
import torch.distributed.launcher.api as launcher

from tests.training.conftest import SpecOf
from training.launch.launcher import launch_config
from training.launch.rank_main import see_one_card

# torch/distributed/launcher/api.py of 2.9.1, the oldest in our images: name, type and default of each field. Later
# versions have added fields (signals_to_handle and virtual_local_rank among others), and removed none.
_LAUNCH_CONFIG_OF_2_9_1: list[tuple[str, Any] | tuple[str, Any, Any]] = [
    ("min_nodes", int),
    ("max_nodes", int),
    ("nproc_per_node", int),
    ("logs_specs", object, None),
    ("run_id", str, ""),
    ("role", str, "default_role"),
    ("rdzv_endpoint", str, ""),
    ("rdzv_backend", str, "etcd"),
    ("rdzv_configs", dict, field(default_factory=dict)),
    ("rdzv_timeout", int, -1),
    ("max_restarts", int, 3),
    ("monitor_interval", float, 0.1),
    ("start_method", str, "spawn"),
    ("log_line_prefix_template", str, None),
    ("metrics_cfg", dict, field(default_factory=dict)),
    ("local_addr", str, None),
    ("event_log_handler", str, "null"),
    ("numa_options", object, None),
]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_engine_of_torch_2_9_knows_all_that_it_is_asked_for(
    device: str, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(num_gpus=2, device=device)
    now: Any = launch_config(spec)
    monkeypatch.setattr(launcher, "LaunchConfig", make_dataclass("LaunchConfig", _LAUNCH_CONFIG_OF_2_9_1))
    then: Any = launch_config(spec)
    for name in ("min_nodes", "max_nodes", "nproc_per_node", "run_id", "rdzv_backend", "max_restarts", "local_addr"):
        assert getattr(then, name) == getattr(now, name)
    assert then.nproc_per_node == 2 and then.max_restarts == 0


@dataclass(frozen=True)
class _Card:
    shown: str | None
    rank: str
    seen: str


@pytest.mark.parametrize(
    "card",
    [
        _Card(shown="4,6", rank="0", seen="4"),
        _Card(shown="4, 6", rank="1", seen="6"),
        _Card(shown="GPU-5d3a,GPU-91c0", rank="1", seen="GPU-91c0"),
        _Card(shown=None, rank="1", seen="1"),
        _Card(shown="", rank="0", seen="0"),
    ],
    ids=str,
)
def test_a_rank_sees_its_own_card_alone_and_calls_it_0(card: _Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", card.rank)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", card.shown or "")
    if card.shown is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    see_one_card()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"]) == (card.seen, "0")


def test_a_rank_without_a_card_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(IndexError, match="rank 2 has no card: CUDA_VISIBLE_DEVICES=0,1"):
        see_one_card()
