"""The NVML of a host that a test describes, for a machine without a GPU: put its folder first on PYTHONPATH.

It has the functions of NVIDIA's library (nvidia-ml-py) that we call, and raises its errors where NVML's reference says
so. NVML_DOUBLE describes the cards, as JSON; without it there are four H100:

    [{"name": "NVIDIA H100 80GB HBM3", "gib": 79, "used_gib": 60, "lost": true,
      "mig": [{"name": "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "gib": 39}, null]}]

`mig` puts a card in MIG mode; null is a place without an instance. `"mig": []` is the mode without instances.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

NVML_TEMPERATURE_GPU = 0
NVML_DEVICE_MIG_ENABLE = 1
NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_INVALID_ARGUMENT = 2
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_GPU_IS_LOST = 15

_GIB = 1024**3
_H100 = {"name": "NVIDIA H100 80GB HBM3", "gib": 79}


class NVMLError(Exception):
    """Raised with the code of NVIDIA's library."""

    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


@dataclass(frozen=True)
class Memory:
    """Memory in bytes: as NVML counts it, `used` and `free` are of all processes together."""

    total: int
    used: int

    @property
    def free(self) -> int:
        return self.total - self.used


@dataclass(frozen=True)
class Handle:
    """A card, or an instance of one: `place` is its number there."""

    card: int
    place: int | None = None

    @property
    def described(self) -> dict[str, Any]:
        one: dict[str, Any] = _cards()[self.card]
        if one.get("lost"):
            raise NVMLError(NVML_ERROR_GPU_IS_LOST)
        return one if self.place is None else one["mig"][self.place]

    @property
    def uuid(self) -> str:
        kind = "GPU" if self.place is None else "MIG"
        return f"{kind}-{self.card:x}{(self.place or 0):x}c0ffee-0000-4000-8000-00000000000{self.card:x}"


@dataclass
class _Library:
    is_open: bool = field(default=False)


_library = _Library()


def _cards() -> list[dict[str, Any]]:
    if not _library.is_open:
        raise NVMLError(NVML_ERROR_UNINITIALIZED)
    return json.loads(os.environ["NVML_DOUBLE"]) if "NVML_DOUBLE" in os.environ else [_H100] * 4  # type: ignore[no-any-return]


def _whole(handle: Handle) -> dict[str, Any]:
    """What is known of a card only, and not of an instance."""
    if handle.place is not None:
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    return handle.described


def nvmlInit() -> None:
    _library.is_open = True


def nvmlSystemGetDriverVersion() -> str:
    return "580.95.05"


def nvmlSystemGetCudaDriverVersion() -> int:
    return int(os.environ.get("NVML_DOUBLE_CUDA", "13000"))


def nvmlDeviceGetCount() -> int:
    return len(_cards())


def nvmlDeviceGetHandleByIndex(index: int) -> Handle:
    if not 0 <= index < len(_cards()):
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    handle = Handle(index)
    assert handle.described
    return handle


def nvmlDeviceGetHandleByUUID(uuid: str) -> Handle:
    """Takes whole UUIDs only, of cards and of instances."""
    for card, described in enumerate(_cards()):
        places = [None, *(place for place, one in enumerate(described.get("mig") or ()) if one)]
        for handle in (Handle(card, place) for place in places):
            if handle.uuid == uuid:
                assert handle.described
                return handle
    raise NVMLError(NVML_ERROR_NOT_FOUND)


def nvmlDeviceGetUUID(handle: Handle) -> str:
    assert handle.described
    return handle.uuid


def nvmlDeviceGetName(handle: Handle) -> str:
    return str(handle.described["name"])


def nvmlDeviceGetMemoryInfo(handle: Handle) -> Memory:
    described = handle.described
    return Memory(int(described["gib"] * _GIB), int(described.get("used_gib", 0) * _GIB))


def nvmlDeviceGetCudaComputeCapability(handle: Handle) -> list[int]:
    return list(_whole(handle).get("capability", (9, 0)))


def nvmlDeviceGetMigMode(device: Handle) -> list[int]:
    described = _whole(device)
    if described.get("has_no_mig"):
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    return [int("mig" in described)] * 2


def nvmlDeviceGetMaxMigDeviceCount(device: Handle) -> int:
    return len(_whole(device)["mig"])


def nvmlDeviceGetMigDeviceHandleByIndex(device: Handle, index: int) -> Handle:
    places = _whole(device).get("mig")
    if places is None:
        raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
    if not 0 <= index < len(places):
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    if places[index] is None:
        raise NVMLError(NVML_ERROR_NOT_FOUND)
    return Handle(device.card, index)


def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(migDevice: Handle) -> Handle:
    if migDevice.place is None:
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    return Handle(migDevice.card)


def nvmlDeviceIsMigDeviceHandle(device: Handle) -> int:
    return int(device.place is not None)


def nvmlDeviceGetGpuInstanceId(device: Handle) -> int:
    if device.place is None:
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    return device.place + 1


def nvmlDeviceGetComputeInstanceId(device: Handle) -> int:
    if device.place is None:
        raise NVMLError(NVML_ERROR_INVALID_ARGUMENT)
    return 0


def nvmlDeviceGetUtilizationRates(handle: Handle) -> object:
    raise NVMLError(NVML_ERROR_NOT_SUPPORTED)


def nvmlDeviceGetTemperature(handle: Handle, sensor: int) -> int:
    raise NVMLError(NVML_ERROR_NOT_SUPPORTED)


def nvmlDeviceGetPowerUsage(handle: Handle) -> int:
    raise NVMLError(NVML_ERROR_NOT_SUPPORTED)
