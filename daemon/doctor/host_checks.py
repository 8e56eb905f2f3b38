"""The doctor's checks of this machine: libraries, GPUs, models, disks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from daemon.base_model.resolve import resolve_model
from daemon.doctor.check_result import CheckResult, green, red, yellow
from daemon.errors import JobError
from daemon.host.disk_probe import probe_disk
from daemon.host.gpus import list_gpus
from daemon.host.inspect import driver_version, installed_versions, unmet_requirements
from daemon.settings import Settings, quantized_dir
from daemon.trainer.run_selfcheck import Selfcheck, run_selfcheck
from training.events import ErrorCode

# Compiling the kernels takes a minute on a new host.
SELFCHECK_SECONDS = 300.0
PROBE_BYTES = 32 * 1024 * 1024
SLOW_DISK_MB_A_SECOND = 50.0
MIN_FREE_GIB = 10.0


def check_python() -> CheckResult:
    versions = installed_versions()
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    missing = {"torch", "transformers", "peft", "trl", "bitsandbytes"} - versions.keys()
    if missing:
        return red("versions", f"not installed: {', '.join(sorted(missing))}", "run `pip install brightrun-trainer`")
    if unmet := [f"{asked}, and {here} is installed" for asked, here in unmet_requirements()]:
        return red("versions", f"needed: {'; '.join(unmet)}", "install with constraints.txt, or build the image again")
    return green("versions", shown)


def check_device(settings: Settings) -> CheckResult:
    found = list_gpus()
    if settings.device == "cpu":
        return green("GPU", "not used, since TRAINER_DEVICE=cpu: small models train on the CPU")
    if found.fault is not None:
        return red("GPU", found.fault, "set CUDA_VISIBLE_DEVICES to names that `nvidia-smi -L` lists, or unset it")
    if found.gpus:
        cards = ", ".join(f"{gpu.name} {gpu.memory_gb:.1f} GiB" for gpu in found.gpus)
        return green("GPU", f"{cards}; driver {driver_version()}")
    return red("GPU", "no NVIDIA GPU answers", "check the driver with nvidia-smi, or set TRAINER_DEVICE=cpu")


async def check_trainer(settings: Settings) -> AsyncIterator[CheckResult]:
    gpus = () if settings.device == "cpu" else list_gpus().gpus
    device = "cuda" if gpus else "cpu"
    try:
        checked = await run_selfcheck(
            device,
            [gpu.cuda_name for gpu in gpus[:1]],
            SELFCHECK_SECONDS,
            kernels=device == "cuda",
            work_dir=settings.work_dir,
        )
    except TimeoutError:
        yield red("trainer", f"no answer in {SELFCHECK_SECONDS:.0f} s", "look for a hung driver: nvidia-smi, dmesg")
        return
    for finding in findings_of(checked, device):
        yield finding


def findings_of(checked: Selfcheck, device: str) -> Iterator[CheckResult]:
    """Turns the result of a selfcheck into lines of the screen."""
    if checked.crash is not None:
        yield red("trainer", checked.crash[:200], "the libraries do not fit together: install with constraints.txt")
        return
    found = checked.found
    if device == "cuda" and not found["cuda_available"]:
        yield _no_cuda(found)
        return
    if found["nf4_error"] is None:
        yield green("4-bit layers", f"bitsandbytes {found['bitsandbytes']} computes on {device}")
    else:
        yield red("4-bit layers", found["nf4_error"], "this bitsandbytes build does not fit this CUDA: reinstall it")
    if device == "cpu":
        return
    yield green("CUDA", f"{found['cuda']}, compute capability {found['capability']}")
    if found["bf16"]:
        yield green("bf16", "this GPU computes in it")
    else:
        yield red("bf16", "this GPU does not compute in bf16", "use an Ampere GPU (A100, A10, RTX 30) or newer")
    yield from _kernels(found)


def _kernels(found: dict[str, Any]) -> Iterator[CheckResult]:
    """Tells what was proven of the kernels on this GPU, forward and backward, against plain PyTorch."""
    if found["experts_fault"] is None:
        yield green("experts", "grouped products are right on this GPU, forward and backward")
    else:
        yield red("experts", found["experts_fault"], "mixtures of experts cannot be trained: reinstall torch")
    for package, slower, advice in (
        ("flash-linear-attention", "many times slower", "run `pip install flash-linear-attention`"),
        ("causal-conv1d", "slower", "install a wheel for this torch, CUDA and Python: the operator's guide says where"),
    ):
        if (missing := found[package.replace("-", "_")]) is not None:
            yield yellow(package, f"{missing}, so Qwen3-Next trains {slower}", advice)
        elif package == "causal-conv1d" and found["causal_conv1d_by_fla"]:
            yield green(package, "flash-linear-attention's own convolution stands in for it")
        else:
            yield green(package, "installed")
    if found["kernel_fault"] is not None:
        yield red("linear attention", found["kernel_fault"], "Qwen3-Next is refused: use the torch of constraints.txt")
    elif found["flash_linear_attention"] is None:
        yield green("linear attention", "its kernels are right on this GPU, forward and backward")


def _no_cuda(found: dict[str, Any]) -> CheckResult:
    built, driver = found["cuda"], found["driver_cuda"]
    detail = f"PyTorch {found['torch']} sees no GPU"
    if built is None:
        return red("CUDA", f"{detail}: it is a build for CPUs", "install PyTorch's build for CUDA")
    if driver is not None and int(driver.partition(".")[0]) < int(built.partition(".")[0]):
        return red(
            "CUDA",
            f"{detail}: it is built for CUDA {built}, and this driver serves CUDA {driver} and older",
            f"take a host whose driver serves CUDA {built}, or build the image on a base of CUDA 12 with "
            "TORCH=2.13.0+cu126",
        )
    return red("CUDA", detail, "look at nvidia-smi and dmesg: the driver answers, and CUDA does not start")


async def check_model(settings: Settings) -> AsyncIterator[CheckResult]:
    """Checks whether the default model is whole, and its 4-bit copy."""
    offline = settings.model_copy(update={"model_downloads": False})
    name = settings.default_model
    try:
        model = await resolve_model(None, offline)
    except JobError as error:
        if settings.model_downloads and error.code is ErrorCode.MODEL_NOT_FOUND:
            yield yellow(
                "default model",
                f"{name} is not on this host",
                f"run `brightrun-trainer models pull {name}` (a large model takes hours)",
            )
        else:
            yield red(
                "default model", error.for_the_operator, error.hint or f"run `brightrun-trainer models pull {name}`"
            )
        return
    yield green("default model", f"{model.name}, whole, in {model.path}")
    yield await asyncio.to_thread(_check_copy, settings, model.name)


def _check_copy(settings: Settings, name: str) -> CheckResult:
    """Checks whether these libraries made the 4-bit copy and all files are there; the trainer checks the hashes."""
    advice = f"run `brightrun-trainer models quantize {name}`, or the first job loads the whole model and makes it"
    problem = "none yet"
    for manifest in sorted(quantized_dir(settings).glob(f"{name.replace('/', '--')}-nf4-*/manifest.json")):
        try:
            told = json.loads(manifest.read_text(encoding="utf-8"))
            versions: dict[str, str] = told["fingerprint"]["versions"]
            absent = [file for file in told["files"] if not (manifest.parent / file).is_file()]
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"{manifest} cannot be read: {error}"
            continue
        installed = installed_versions()
        others = [f"{library} {made}" for library, made in versions.items() if installed.get(library) != made]
        if not absent and not others:
            size = sum(file.stat().st_size for file in manifest.parent.iterdir())
            return green("4-bit copy", f"{size / 1024**3:.1f} GiB in {manifest.parent}")
        problem = f"lacks {', '.join(absent)}" if absent else f"was made by {', '.join(others)}"
    return yellow("4-bit copy", problem, advice)


def check_disk(name: str, folder: Path) -> CheckResult:
    try:
        probe = probe_disk(folder, PROBE_BYTES)
    except OSError as error:
        variable = "TRAINER_WORK_DIR" if name.startswith("work") else "TRAINER_MODELS_DIR"
        return red(name, f"{folder}: {error.strerror}", f"mount the volume, or set {variable} to a writable folder")
    speed = probe.written_bytes / 1e6 / probe.seconds
    free = probe.free_bytes / 1024**3
    detail = f"{folder}: {free:.0f} GiB free, writes {speed:.0f} MB/s"
    if free < MIN_FREE_GIB:
        return red(name, detail, "free space on the volume, or enlarge it")
    if speed < SLOW_DISK_MB_A_SECOND:
        return yellow(name, detail, "the disk is slow: checkpoints and model loading will take long")
    return green(name, detail)
