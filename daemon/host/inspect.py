"""Describes this host: a new identity each boot, its GPUs, its versions, its load."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Literal
from uuid import UUID, uuid4

import structlog

from daemon.errors import HostUnfit
from daemon.settings import Settings

log = structlog.get_logger()

# A GPU that is sold as 80 GB reports 79.6.
MEMORY_TOLERANCE = 0.95
REPORTED_PACKAGES = ("brightrun-trainer", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    memory_gb: float


@dataclass(frozen=True)
class Host:
    """This host, as it claims jobs. A new UUID each boot: pods reuse host names, and a reused name hides orphans."""

    device: Literal["cuda", "cpu"]
    gpus: tuple[Gpu, ...] = ()
    worker_id: UUID = field(default_factory=uuid4)
    hostname: str = field(default_factory=platform.node)
    pod_id: str | None = None

    @property
    def gpu_memory_gb(self) -> float | None:
        """Memory of the smallest GPU, because any GPU may be the free one. None without GPUs."""
        return min((gpu.memory_gb for gpu in self.gpus), default=None)

    @property
    def gpu_type(self) -> str | None:
        return self.gpus[0].name if self.gpus else None


def inspect_host(settings: Settings) -> Host:
    """Inspects this machine. Raises HostUnfit if the settings name a GPU that is not there."""
    gpus = find_gpus()
    if settings.device == "cpu":
        return Host(device="cpu", pod_id=os.environ.get("RUNPOD_POD_ID"))
    if not gpus:
        raise HostUnfit(
            "no NVIDIA GPU answers on this host. Check the driver with nvidia-smi, "
            "or set TRAINER_DEVICE=cpu to train small models on the CPU."
        )
    return Host(device="cuda", gpus=gpus, pod_id=os.environ.get("RUNPOD_POD_ID"))


def find_gpus() -> tuple[Gpu, ...]:
    """The GPUs that NVML lists; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("nvml_absent", error=str(error))
        return ()
    gpus = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        # GB as the vendor and gpu_config.gpu_memory_gb count them: an "80 GB" GPU reports 79.6 GiB.
        gpus.append(Gpu(index, str(pynvml.nvmlDeviceGetName(handle)), round(memory.total / 1024**3, 1)))
    return tuple(gpus)


def driver_version() -> str | None:
    """The NVIDIA driver's version, if there is a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def installed_versions() -> dict[str, str]:
    """Versions of installed packages from their metadata, without importing them."""
    found = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
