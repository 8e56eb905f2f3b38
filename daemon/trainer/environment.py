"""The environment variables that a trainer inherits: an allow list without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUBLAS_WORKSPACE_CONFIG",
    "BNB_CUDA_VERSION",
    # Triton compiles its launcher with this compiler.
    "CC",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)
# What the libraries on a GPU are tuned and repaired with: network interfaces, compilers, caches, kernels to avoid.
INHERITED_GROUPS = ("CUDA_", "NCCL_", "TORCH_NCCL_", "GLOO_", "TRITON_", "FLA_", "TORCHINDUCTOR_", "TORCH_LOGS")
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)


def child_environment(
    environment: Mapping[str, str], gpus: Sequence[str], work_dir: Path | None = None
) -> dict[str, str]:
    """Returns the child's whole environment: the allow list, its GPUs, and the hub switched off.

    `gpus` are names as CUDA_VISIBLE_DEVICES takes them. Compiled kernels are kept in `work_dir`, on the volume, so that
    a new pod does not compile them again.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name in INHERITED or (name.startswith(INHERITED_GROUPS) and not _SECRET_NAME.search(name))
    }
    if "PYTORCH_ALLOC_CONF" not in kept and "PYTORCH_CUDA_ALLOC_CONF" not in kept:
        # Fewer failed allocations near the GPU's memory limit (PyTorch's CUDA memory notes).
        kept["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if work_dir is not None:
        # Keyed by version, kernel and card, and written by renaming: hosts of one volume share them.
        if "TRITON_HOME" not in kept:
            kept.setdefault("TRITON_CACHE_DIR", str(work_dir / ".kernels" / "triton"))
        kept.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work_dir / ".kernels" / "inductor"))
    return kept | {
        "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        # NVML numbers the GPUs this way; CUDA by default does not.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
    }
