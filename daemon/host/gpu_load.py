"""The current load of a GPU, read from NVML."""

from __future__ import annotations

from dataclasses import dataclass

from daemon.host.gpus import Gpu


@dataclass(frozen=True)
class GpuLoad:
    """One reading of one GPU. Any value may be None: not every GPU reports all of them."""

    utilization_percent: float | None = None
    memory_used_gib: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None


def read_load(gpu: Gpu) -> GpuLoad:
    """Reads utilisation, memory, temperature and power of one GPU, as far as it reports them (MIG: only memory)."""
    import pynvml

    def ask(question: object, *arguments: object) -> float | None:
        try:
            return float(question(*arguments))  # type: ignore[operator]
        except pynvml.NVMLError:
            return None

    try:
        if gpu.uuid is None:
            handle = pynvml.nvmlDeviceGetHandleByIndex(gpu.index)
        else:
            handle = pynvml.nvmlDeviceGetHandleByUUID(gpu.uuid)
        used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
    except pynvml.NVMLError:
        return GpuLoad()
    power = ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    return GpuLoad(
        utilization_percent=ask(lambda h: pynvml.nvmlDeviceGetUtilizationRates(h).gpu, handle),
        memory_used_gib=round(used / 1024**3, 2),
        temperature_celsius=ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        power_watts=None if power is None else power / 1000.0,
    )
