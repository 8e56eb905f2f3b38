"""Which GPUs a host offers: what NVML lists, in MIG by instance, within the operator's CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pynvml
import pytest

from daemon.errors import HostUnfit
from daemon.host.gpu_load import read_load
from daemon.host.gpus import Gpu, find_gpus, list_gpus
from daemon.host.inspect import Host, inspect_host
from daemon.host.slots import GpuSlots
from daemon.settings import Settings
from tests.paths import DOUBLES

H100 = {"name": "NVIDIA H100 80GB HBM3", "gib": 79}
SLICED = {
    **H100,
    "mig": [{"name": "NVIDIA H100 MIG 4g.40gb", "gib": 39}, None, {"name": "NVIDIA H100 MIG 3g.40gb", "gib": 38}],
}
FIRST, SECOND = "GPU-00c0ffee-0000-4000-8000-000000000000", "GPU-10c0ffee-0000-4000-8000-000000000001"
SLICE = "MIG-12c0ffee-0000-4000-8000-000000000001"

Describe = Callable[..., ModuleType]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Describe:
    """Describes the cards of this host, and what the operator shows of them."""

    def describe(*cards: dict[str, Any], shown: str | None = None) -> ModuleType:
        spec = importlib.util.spec_from_file_location("pynvml", DOUBLES / "nvml" / "pynvml.py")
        assert spec is not None and spec.loader is not None
        double = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "pynvml", double)
        spec.loader.exec_module(double)
        monkeypatch.setenv("NVML_DOUBLE", json.dumps(cards))
        if shown is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        return double

    return describe


def names(gpus: tuple[Gpu, ...]) -> list[str]:
    assert [gpu.index for gpu in gpus] == list(range(len(gpus))), "slots are numbered without gaps"
    return [gpu.cuda_name for gpu in gpus]


def test_the_double_has_the_functions_of_the_real_library(nvml: Describe) -> None:
    double = nvml(H100)
    for name, function in inspect.getmembers(double, inspect.isfunction):
        if name.startswith("nvml"):
            real = list(inspect.signature(getattr(pynvml, name)).parameters)
            assert real[: len(inspect.signature(function).parameters)] == list(inspect.signature(function).parameters)
    for name in vars(double):
        if name.startswith("NVML_"):
            assert getattr(double, name) == getattr(pynvml, name), name


@pytest.mark.parametrize(
    ("shown", "offered"),
    [
        (None, [FIRST, SECOND]),
        ("1", [SECOND]),
        ("1,0", [SECOND, FIRST]),
        (f"{SECOND}, {FIRST}", [SECOND, FIRST]),
        ("GPU-1", [SECOND]),
        # As in CUDA, the list ends at -1.
        ("0,-1,1", [FIRST]),
        ("0,", [FIRST]),
    ],
)
def test_only_cards_that_the_operator_shows_are_offered(shown: str | None, offered: list[str], nvml: Describe) -> None:
    nvml(H100, H100, shown=shown)
    assert list_gpus().fault is None and names(find_gpus()) == offered


@pytest.mark.parametrize(
    ("shown", "told"),
    [
        ("", "CUDA_VISIBLE_DEVICES= shows no GPU to this process, and this host has: 0, 1"),
        ("-1", "shows no GPU"),
        ("0,7", "7 names no GPU that answers; this host has: 0, 1"),
        ("GPU-77", "GPU-77 names no GPU that answers"),
        ("GPU-", "GPU- names several GPUs"),
        ("0,GPU-0", "GPU-0 names a GPU for the second time"),
        ("cuda:0", "cuda:0 names no GPU"),
    ],
)
def test_a_choice_that_names_no_card_is_refused_in_words(shown: str, told: str, nvml: Describe) -> None:
    nvml(H100, H100, shown=shown)
    settings = Settings(_env_file=None, database_url="postgresql://x", device="auto")
    with pytest.raises(HostUnfit) as refused:
        inspect_host(settings)
    assert told in str(refused.value)
    # A host that is told to use its CPU does not mind.
    assert inspect_host(settings.model_copy(update={"device": "cpu"})).gpus == ()


@pytest.mark.parametrize(
    ("shown", "offered"),
    [
        (None, [FIRST, "MIG-10c0ffee-0000-4000-8000-000000000001", SLICE]),
        ("1", ["MIG-10c0ffee-0000-4000-8000-000000000001", SLICE]),
        (SECOND, ["MIG-10c0ffee-0000-4000-8000-000000000001", SLICE]),
        (SLICE, [SLICE]),
        ("MIG-12", [SLICE]),
        # The form of drivers before 470, which CUDA still takes.
        (f"MIG-{SECOND}/3/0", [SLICE]),
    ],
)
def test_a_card_in_mig_mode_is_offered_by_instance(shown: str | None, offered: list[str], nvml: Describe) -> None:
    nvml(H100, SLICED, shown=shown)
    assert list_gpus().fault is None and names(find_gpus()) == offered


def test_an_instance_has_its_own_memory_and_no_job_has_two(nvml: Describe) -> None:
    nvml(SLICED)
    host = Host("cuda", find_gpus())
    assert (host.gpu_memory_gb, host.gpus[0].memory_gb) == (38, 39)
    slots = GpuSlots(host, None)
    assert (host.gpus_per_job, slots.free_gpus) == (1, 1)
    taken = slots.take(1), slots.take(1)
    assert taken == ((0,), (1,)) and slots.free_gpus == 0


@pytest.mark.parametrize(
    ("cards", "shown", "told"),
    [
        ([{**H100, "mig": []}], None, "GPU 0 is in MIG mode and has no instance"),
        ([SLICED], "MIG-", "MIG- names several GPUs"),
        ([SLICED], "MIG-99", "MIG-99 names no GPU that answers; this host has: MIG-00c0ffee"),
    ],
)
def test_faults_of_mig_are_told(cards: list[dict[str, Any]], shown: str | None, told: str, nvml: Describe) -> None:
    nvml(*cards, shown=shown)
    assert told in (list_gpus().fault or "")


def test_a_lost_card_hides_no_other_and_is_missed_where_it_is_named(nvml: Describe) -> None:
    nvml({**H100, "lost": True}, H100)
    assert names(find_gpus()) == [SECOND]
    nvml({**H100, "lost": True}, H100, shown="0,1")
    assert "0 names no GPU that answers; this host has: 1" in (list_gpus().fault or "")


def test_a_host_without_a_driver_has_no_gpu_and_no_fault(nvml: Describe, monkeypatch: pytest.MonkeyPatch) -> None:
    double = nvml(H100, shown="0")

    def absent() -> None:
        raise double.NVMLError(double.NVML_ERROR_NOT_FOUND)

    monkeypatch.setattr(double, "nvmlInit", absent)
    assert (find_gpus(), list_gpus().fault) == ((), None)


def test_the_load_is_that_of_the_jobs_own_gpu(nvml: Describe) -> None:
    used = [{"name": "a", "gib": 39, "used_gib": 7}, {"name": "b", "gib": 38, "used_gib": 12.5}]
    nvml({**H100, "used_gib": 70}, {**H100, "used_gib": 20, "mig": used}, shown="MIG-11,0")
    assert [read_load(gpu).memory_used_gib for gpu in find_gpus()] == [12.5, 70]
