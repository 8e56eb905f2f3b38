"""The GPUs that this host may use: those that NVML lists, within the operator's CUDA_VISIBLE_DEVICES.

A card in MIG mode counts as its instances, each a GPU of its own size, since CUDA computes on an instance and never on
the whole card. A trainer is given its GPUs by UUID, which means the same card in every process and every order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import structlog

log = structlog.get_logger()

# CUDA reads the list up to the first of these, and sees what stands before it.
_ENDS = {"", "-1", "NoDevFiles"}


@dataclass(frozen=True)
class Gpu:
    """One GPU. `index` is its slot on this host, and CUDA's number where CUDA_VISIBLE_DEVICES is passed on as it is."""

    index: int
    name: str
    memory_gb: float
    uuid: str | None = None
    is_mig: bool = False

    @property
    def cuda_name(self) -> str:
        """How CUDA_VISIBLE_DEVICES names it."""
        return self.uuid or str(self.index)


@dataclass(frozen=True)
class GpuList:
    """The GPUs that answer and may be used, and what is wrong with the choice of them."""

    gpus: tuple[Gpu, ...] = ()
    fault: str | None = None


@dataclass(frozen=True)
class _Device:
    """A whole card or an instance of one, with all the names under which CUDA_VISIBLE_DEVICES may mean it."""

    card: int
    card_uuid: str
    uuid: str
    older_uuid: str
    name: str
    memory_gb: float
    is_mig: bool

    def is_meant_by(self, entry: str) -> bool:
        if entry.isdecimal():
            return int(entry) == self.card
        # As CUDA has it, the beginning of a UUID is enough.
        return any(
            uuid.startswith(entry) for uuid in (self.uuid, self.card_uuid, self.older_uuid) if entry[:4] == uuid[:4]
        )


def find_gpus() -> tuple[Gpu, ...]:
    """Returns the GPUs that may be used and answer; none without a driver."""
    return list_gpus().gpus


def list_gpus() -> GpuList:
    """Asks NVML, and leaves out what CUDA_VISIBLE_DEVICES leaves out. Numbers in it are those of nvidia-smi."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        log.debug("nvml_absent", error=str(error))
        return GpuList()
    devices = []
    without_instance = []
    for card in range(count):
        try:
            found = list(_devices_of(card, pynvml))
        except pynvml.NVMLError as error:
            # A lost card must not hide the others.
            log.warning("gpu_silent", index=card, error=str(error))
            continue
        devices += found
        without_instance += [] if found else [str(card)]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen, fault = (devices, None) if shown is None else _choose(devices, shown)
    if fault is None and not chosen and without_instance:
        fault = (
            f"GPU {', '.join(without_instance)} is in MIG mode and has no instance: make some "
            "(`nvidia-smi mig -cgi … -C`), or switch the mode off (`nvidia-smi -mig 0`)"
        )
    return GpuList(
        tuple(Gpu(slot, one.name, one.memory_gb, one.uuid, one.is_mig) for slot, one in enumerate(chosen)), fault
    )


def _devices_of(card: int, pynvml: Any) -> Iterator[_Device]:
    """Yields a card, or its MIG instances."""
    handle = pynvml.nvmlDeviceGetHandleByIndex(card)
    try:
        card_uuid = str(pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError:
        card_uuid = str(card)  # some virtual cards have none
    if not _is_in_mig_mode(handle, pynvml):
        name, memory = _describe(handle, pynvml)
        yield _Device(card, card_uuid, card_uuid, card_uuid, name, memory, is_mig=False)
        return
    for number in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
        except pynvml.NVMLError:
            continue  # NVML numbers places for instances, and not every place has one
        name, memory = _describe(instance, pynvml)
        places = pynvml.nvmlDeviceGetGpuInstanceId(instance), pynvml.nvmlDeviceGetComputeInstanceId(instance)
        yield _Device(
            card,
            card_uuid,
            str(pynvml.nvmlDeviceGetUUID(instance)),
            f"MIG-{card_uuid}/{places[0]}/{places[1]}",
            name,
            memory,
            is_mig=True,
        )


def _describe(handle: object, pynvml: Any) -> tuple[str, float]:
    # GB as the vendor and gpu_config.gpu_memory_gb count them: an "80 GB" GPU reports 79.6 GiB.
    memory = round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 1024**3, 1)
    return str(pynvml.nvmlDeviceGetName(handle)), memory


def _is_in_mig_mode(handle: object, pynvml: Any) -> bool:
    try:
        current, _pending = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:
        return False  # a card that has no MIG
    return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)


def _choose(devices: list[_Device], shown: str) -> tuple[list[_Device], str | None]:
    """Returns the devices that CUDA_VISIBLE_DEVICES names, in its order, and what is wrong with it."""
    entries = [entry.strip() for entry in shown.split(",")]
    named = entries[: next((place for place, entry in enumerate(entries) if entry in _ENDS), len(entries))]
    here = ", ".join(dict.fromkeys(str(one.card) if not one.is_mig else one.uuid for one in devices)) or "none"
    if not named:
        return [], f"CUDA_VISIBLE_DEVICES={shown} shows no GPU to this process, and this host has: {here}"
    chosen: list[_Device] = []
    for entry in named:
        meant = [one for one in devices if one.is_meant_by(entry)]
        # A card means all its instances; an instance must be named alone.
        if len(meant if entry.startswith("MIG") else {one.card for one in meant}) != 1:
            count = "several GPUs" if meant else "no GPU that answers"
            return chosen, f"CUDA_VISIBLE_DEVICES={shown}: {entry} names {count}; this host has: {here}"
        if set(meant) & set(chosen):
            return chosen, f"CUDA_VISIBLE_DEVICES={shown}: {entry} names a GPU for the second time"
        chosen += meant
    return chosen, None
