"""The environment variables that a trainer inherits: an allow list without secrets."""

from __future__ import annotations

from collections.abc import Mapping

# What the child inherits. Everything else is left out, so that no secret can leak.
INHERITED = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "CUDA_HOME",
    "CUDA_PATH",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TRITON_CACHE_DIR",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)


def child_environment(environment: Mapping[str, str], gpus: tuple[int, ...]) -> dict[str, str]:
    """Returns the child's whole environment: the allow list, its GPUs, and the hub switched off."""
    kept = {name: environment[name] for name in INHERITED if name in environment}
    return kept | {
        "CUDA_VISIBLE_DEVICES": ",".join(str(index) for index in gpus),
        # NVML numbers the GPUs this way; CUDA by default does not.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Fewer failed allocations near the GPU's memory limit (PyTorch's CUDA memory notes).
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
