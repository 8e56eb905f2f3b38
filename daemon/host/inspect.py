"""Describes this host: a new identity each boot, its GPUs, its versions, its load."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal
from uuid import UUID, uuid4

from packaging.requirements import Requirement

from daemon.errors import HostUnfit
from daemon.host.gpus import Gpu, list_gpus
from daemon.settings import Settings

# A GPU that is sold as 80 GB reports 79.6.
MEMORY_TOLERANCE = 0.95
REPORTED_PACKAGES = ("brightrun-trainer", "torch", "triton", "transformers", "peft", "trl", "bitsandbytes")


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
    def gpus_per_job(self) -> int:
        """How many GPUs one job can have. Instances of MIG cannot be joined: NCCL takes two of one card for one GPU."""
        return min(1, len(self.gpus)) if any(gpu.is_mig for gpu in self.gpus) else len(self.gpus)

    @property
    def gpu_type(self) -> str | None:
        return self.gpus[0].name if self.gpus else None


def inspect_host(settings: Settings) -> Host:
    """Inspects this machine. Raises HostUnfit if the settings name a GPU that is not there."""
    if settings.device == "cpu":
        return Host(device="cpu", pod_id=os.environ.get("RUNPOD_POD_ID"))
    found = list_gpus()
    if found.fault is not None:
        raise HostUnfit(found.fault)
    if not found.gpus:
        raise HostUnfit(
            "no NVIDIA GPU answers on this host. Check the driver with nvidia-smi, "
            "or set TRAINER_DEVICE=cpu to train small models on the CPU."
        )
    return Host(device="cuda", gpus=found.gpus, pod_id=os.environ.get("RUNPOD_POD_ID"))


def driver_version() -> str | None:
    """The NVIDIA driver's version, if there is a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def unmet_requirements() -> list[tuple[str, str]]:
    """Lists what this project asks for and has in another version: ("torch>=2.13", "2.11.0")."""
    try:
        asked = [Requirement(line) for line in requires("brightrun-trainer") or ()]
    except PackageNotFoundError:
        return []  # a checkout that was not installed
    unmet = []
    for requirement in asked:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            here = version(requirement.name)
        except PackageNotFoundError:
            continue  # its import says so
        if not requirement.specifier.contains(here, prereleases=True):
            unmet.append((f"{requirement.name}{requirement.specifier}", here))
    return unmet


def installed_versions() -> dict[str, str]:
    """Versions of installed packages from their metadata, without importing them."""
    found = {"python": platform.python_version()}
    for package in REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
