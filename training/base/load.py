"""Loads the base model in 4 bits with transformers, then counts its bytes and refuses it if anything is incomplete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from bitsandbytes.nn import Linear4bit
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from training.base.architecture import architecture_of
from training.base.dtype import compute_dtype
from training.compute import ComputeType
from training.convolution import offer_fla_convolution
from training.event_writer import EventWriter
from training.events import ErrorCode
from training.failures import TrainingFailed, in_brief
from training.files.model_folder import ModelFolder
from training.files.module_names import UNQUANTISED_MODULES
from training.preflight.kernel_proof import why_not_imported
from training.quantization.disk_copy import CopyUnusable, QuantizedCopy
from training.quantization.experts import EXPERTS_FUNCTION, Nf4Config, expert_states, has_fused_experts
from training.quantization.weights_to_pack import is_in_bytes, refuse_what_is_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LINEAR_ATTENTION_KERNELS = (("flash-linear-attention", "fla"), ("causal-conv1d", "causal_conv1d"))


@dataclass(frozen=True)
class WeightCount:
    """Bytes of a loaded model, by storage form. Embeddings and head are `kept`."""

    quantised_bytes: int
    kept_bytes: int
    parameters: int


class Wanted(Protocol):
    """The part of a spec that loading needs."""

    @property
    def base_model(self) -> str: ...

    @property
    def device(self) -> Literal["cpu", "cuda"]: ...

    @property
    def compute_type(self) -> ComputeType | None: ...

    @property
    def quantize(self) -> bool: ...

    @property
    def quantized_dir(self) -> Path | None: ...


def load_base_model(
    spec: Wanted, folder: ModelFolder, voice: EventWriter | None = None, *, device: torch.device | None = None
) -> PreTrainedModel:
    """Loads frozen weights in NF4 with double quantisation (bf16 if spec.quantize is false).

    They go to the spec's device by default; or to `device`, in the form that a GPU needs.
    Raises TrainingFailed: model_incomplete for missing tensors or damaged files, model_unsupported for an
    architecture that transformers does not know or that would not become 4-bit.
    """
    offer_fla_convolution(spec.device)
    dtype = compute_dtype(spec.device, spec.compute_type)
    device = device_of(spec) if device is None else device
    model = _load_kept_copy(spec, folder, dtype, device) if folder.kept_copy is not None else None
    copy = None
    if model is None and spec.quantize and spec.quantized_dir is not None:
        copy = QuantizedCopy.of(spec.quantized_dir, folder, spec.base_model, dtype)
        model = _load_copy(copy, spec, voice, device) if copy.exists else None
    if model is None:
        model = _load_original(spec, folder, dtype, device)
        if copy is not None and not copy.save(model) and voice is not None:
            voice.notice("quantized_copy_skipped", "the volume has no room for a 4-bit copy of the base model")
    return _frozen(model, spec)


def is_packed_on_disk(spec: Wanted, folder: ModelFolder) -> bool:
    """Returns True if loading only has to read: a 4-bit copy of exactly these files lies on the volume."""
    return spec.quantize and (folder.kept_copy is not None or _copy_of(spec, folder) is not None)


def load_packed(spec: Wanted, folder: ModelFolder) -> PreTrainedModel | None:
    """Loads the 4-bit copy into the host's memory, in the form that a card needs; None if it cannot be used."""
    dtype = compute_dtype(spec.device, spec.compute_type)
    kept = folder.kept_copy is not None
    copy = QuantizedCopy.kept(folder, spec.base_model, dtype) if kept else _copy_of(spec, folder)
    try:
        return None if copy is None else _frozen(copy.load(dtype, torch.device("cpu")), spec)
    except CopyUnusable:
        return None


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Moves a frozen 4-bit model and everything that unpacks it, in place: a tied embedding stays tied to the head."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.to(device)
    for module in model.modules():
        states = list(expert_states(module).values()) if has_fused_experts(module) else []
        if isinstance(module, Linear4bit):
            states = [module.weight.quant_state]
        for state in states:
            state.to(device)
    return model


def device_of(spec: Wanted) -> torch.device:
    return torch.device("cuda", 0) if spec.device == "cuda" else torch.device("cpu")


def _copy_of(spec: Wanted, folder: ModelFolder) -> QuantizedCopy | None:
    if spec.quantized_dir is None:
        return None
    dtype = compute_dtype(spec.device, spec.compute_type)
    copy = QuantizedCopy.of(spec.quantized_dir, folder, spec.base_model, dtype)
    return copy if copy.exists else None


def _frozen(model: PreTrainedModel, spec: Wanted) -> PreTrainedModel:
    """Returns the model as every job finds it. Raises TrainingFailed if a large weight is not in 4 bits."""
    if spec.quantize:
        refuse_what_is_left(model, spec.base_model, is_in_bytes)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512 the first evaluation would repack the weights, with a loss: the run would go on with
            # another model, and a resumed run would differ from an uninterrupted one.
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    model.requires_grad_(False)
    return model


def _load_copy(
    copy: QuantizedCopy, spec: Wanted, voice: EventWriter | None, device: torch.device
) -> PreTrainedModel | None:
    try:
        return copy.load(compute_dtype(spec.device, spec.compute_type), device)
    except CopyUnusable as error:
        if voice is not None:
            voice.notice(
                "quantized_copy_refused", f"the 4-bit copy on the volume is not used: {error}; it is made again"
            )
        copy.discard()
        return None


def _load_kept_copy(spec: Wanted, folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Loads the copy of `models quantize --replace`. It is never discarded: the original weights are gone."""
    again = f"download the model again: `brightrun-trainer models pull {spec.base_model}`"
    if not spec.quantize:
        raise TrainingFailed(
            ErrorCode.MODEL_INCOMPLETE,
            f"only the 4-bit copy of {spec.base_model} is kept on this host, and 16 bits were asked for",
            again,
        )
    try:
        return QuantizedCopy.kept(folder, spec.base_model, dtype).load(dtype, device)
    except CopyUnusable as error:
        raise TrainingFailed(
            ErrorCode.MODEL_INCOMPLETE,
            f"the 4-bit copy of {spec.base_model}, which is all that is kept of it, cannot be used: {error}",
            again,
        ) from error


def _load_original(spec: Wanted, folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if spec.quantize:
        options["quantization_config"] = Nf4Config(dtype, list(UNQUANTISED_MODULES))
        options["experts_implementation"] = EXPERTS_FUNCTION
    architecture = architecture_of(folder, spec.base_model)
    try:
        with _tensors_on_demand(folder) as tensors:
            loaded: Any = architecture.model_class.from_pretrained(
                None,
                config=architecture.config,
                state_dict=tensors,
                dtype=dtype,
                # "auto" would size the model in 16 bits and offload half of it to the CPU.
                device_map={"": device},
                output_loading_info=True,
                **options,
            )
    except SafetensorError as error:
        raise TrainingFailed(
            ErrorCode.MODEL_INCOMPLETE,
            f"the weights of {spec.base_model} are damaged: {in_brief(error)}",
            "download the model again (`brightrun-trainer models verify` names every damaged file)",
        ) from error
    except (ValueError, KeyError, ImportError) as error:
        raise cannot_be_loaded(spec.base_model, error) from error
    model, report = loaded
    refuse_missing(report, spec.base_model)
    if (folder.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder.path)
    original: PreTrainedModel = model
    return original


@contextmanager
def _tensors_on_demand(folder: ModelFolder) -> Iterator[dict[str, Any]]:
    """Maps each stored tensor's name to its data, read from the file when used, into memory of its own.

    Not mmapped, as the library would: mapped pages count as ours until the kernel takes them back, up to the size of
    the whole checkpoint, and weights that stay in 16 bits would depend on the checkpoint's file for the whole run.
    """
    with ExitStack() as files:
        tensors: dict[str, Any] = {}
        for shard in folder.shards:
            file = files.enter_context(safe_open(shard, framework="pt", device="cpu", backend="pread"))
            tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - a file is no dict
        yield tensors


def warn_of_missing_kernels(spec: Wanted, model: PreTrainedModel, voice: EventWriter) -> None:
    """Warns if linear attention on a GPU lacks its kernels: it is many times slower, and transformers says little."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if spec.device != "cuda" or "linear_attention" not in kinds:
        return
    faults = {package: why_not_imported(module) for package, module in _LINEAR_ATTENTION_KERNELS}
    missing = [package for package, fault in faults.items() if fault is not None]
    if missing:
        named = " and ".join(f"{package} {faults[package]}" for package in missing)
        voice.notice(
            "kernels_missing",
            f"on this GPU host {named}: install them in the image. Linear attention falls back to plain PyTorch: "
            "right, many times slower, and without packing",
            missing=missing,
        )


def count_weights(model: torch.nn.Module) -> WeightCount:
    quantised = kept = parameters = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        if parameter.dtype is torch.uint8:
            quantised += size
            parameters += parameter.numel() * 2
        else:
            kept += size
            parameters += parameter.numel()
    return WeightCount(quantised, kept, parameters)


def cannot_be_loaded(name: str, error: Exception) -> TrainingFailed:
    return TrainingFailed(
        ErrorCode.MODEL_UNSUPPORTED,
        f"{name} cannot be loaded as a causal language model: {in_brief(error)}",
        "choose a text model that transformers supports without remote code",
    )


def refuse_missing(report: dict[str, Any], name: str) -> None:
    """Refuses a model with missing tensors: transformers fills them with random numbers."""
    missing = sorted(report.get("missing_keys") or [])
    mismatched = sorted(str(key) for key in report.get("mismatched_keys") or [])
    if missing or mismatched:
        named = ", ".join((missing + mismatched)[:5])
        raise TrainingFailed(
            ErrorCode.MODEL_INCOMPLETE,
            f"the weights of {name} lack {len(missing)} tensors and {len(mismatched)} have another shape: {named}",
            "download the model again (`brightrun-trainer models verify` names every damaged file)",
        )
