"""The NVML of a host with four GPUs, for a machine without one: put its folder first on PYTHONPATH.

It has the functions of NVIDIA's library (nvidia-ml-py) that the daemon calls, except those about load."""

from __future__ import annotations

from dataclasses import dataclass

NVML_TEMPERATURE_GPU = 0
CARDS = 4


class NVMLError(Exception):
    """Raised by NVIDIA's library for a query that a GPU does not support."""


@dataclass(frozen=True)
class Memory:
    """Memory in bytes."""

    total: int = 79 * 1024**3
    used: int = 0


@dataclass(frozen=True)
class Handle:
    index: int


def nvmlInit() -> None:
    """Does nothing: there is a driver."""


def nvmlSystemGetDriverVersion() -> str:
    return "580.95.05"


def nvmlDeviceGetCount() -> int:
    return CARDS


def nvmlDeviceGetHandleByIndex(index: int) -> Handle:
    return Handle(index)


def nvmlDeviceGetMemoryInfo(_handle: Handle) -> Memory:
    return Memory()


def nvmlDeviceGetName(_handle: Handle) -> str:
    return "NVIDIA H100 80GB HBM3"


def nvmlDeviceGetUtilizationRates(_handle: Handle) -> object:
    raise NVMLError("not supported")


def nvmlDeviceGetTemperature(_handle: Handle, _sensor: int) -> int:
    raise NVMLError("not supported")


def nvmlDeviceGetPowerUsage(_handle: Handle) -> int:
    raise NVMLError("not supported")
