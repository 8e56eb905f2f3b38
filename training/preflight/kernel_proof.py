"""Proves on this device that kernels compute what plain PyTorch does, forward and backward, before a job rests on them.

Linear attention (Qwen3-Next) has kernels of its own, flash-linear-attention and causal-conv1d. transformers takes them
where they are installed, and whether they are right depends on card, Triton and CUDA: fla-core 0.6.0 refuses its
backward on Hopper with Triton 3.4.0 to 3.7.0, since the gradients would be wrong, and says so in the first step only,
after the model was loaded and paid for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from training.convolution import offer_fla_convolution
from training.distance import distance
from training.events import ErrorCode
from training.failures import TrainingFailed, broken_part, in_brief, is_out_of_memory
from training.files.model_folder import ModelFolder
from training.spec import JobSpec

if TYPE_CHECKING:
    import torch

# Operands of bfloat16 and sums in float32 end within 1e-3 to 2e-2 of plain float32; a wrong kernel is off by far more.
_ROUNDING = 0.05
# Qwen3-Next's heads, and two texts of lengths that no chunk divides.
_KEY_HEADS, _VALUE_HEADS, _HEAD_SIZE = 16, 32, 128
_BORDERS = (0, 100, 250)

_Tensors = dict[str, "torch.Tensor"]


def refuse_wrong_kernels(spec: JobSpec, folder: ModelFolder) -> None:
    """Raises TrainingFailed if the model has linear attention and the kernels on this GPU would fail or be wrong."""
    kinds = folder.text_config.get("layer_types") or ()
    # Configs of the first Qwen3-Next name an interval and no types.
    if spec.device != "cuda" or not ("linear_attention" in kinds or "linear_num_key_heads" in folder.text_config):
        return
    fault = fault_of_linear_attention(spec.device)
    if fault is not None:
        raise TrainingFailed(
            ErrorCode.MODEL_UNSUPPORTED,
            f"{spec.base_model} cannot be trained on this GPU: {fault}",
            "`brightrun-trainer doctor` shows the fault on that host: install the versions of constraints.txt there, "
            "then submit again",
        )


def fault_of_linear_attention(device: str) -> str | None:
    """Returns why the kernels that transformers takes must not be used on this device. None: right, or not installed.

    Raises what says that the GPU itself is gone or full.
    """
    offer_fla_convolution(device)
    from transformers.models.qwen3_next import modeling_qwen3_next

    for package, distribution, kernel, proof in (
        ("fla", "fla-core", modeling_qwen3_next.torch_chunk_gated_delta_rule, _gated_delta_rule),
        ("causal_conv1d", "causal-conv1d", modeling_qwen3_next.causal_conv1d_fn, _convolution),
    ):
        if (fault := why_not_imported(package)) is not None:
            if fault != NOT_INSTALLED:
                return f"{distribution} {fault}"
            continue
        fault = _fault(lambda kernel=kernel, proof=proof: proof(kernel, device))  # type: ignore[misc]
        if fault is not None:
            return f"{_versions(distribution, device)}: {fault}"
    return None


NOT_INSTALLED = "is not installed"


def why_not_imported(package: str) -> str | None:
    """Says why transformers falls back from this package: it does so without a word, whatever the import raises."""
    if find_spec(package) is None:
        return NOT_INSTALLED
    try:
        import_module(package)
    except Exception as error:  # noqa: BLE001 - as transformers does
        return f"cannot be imported ({type(error).__name__}: {in_brief(error)})"
    return None


def fault_of_grouped_products(device: str) -> str | None:
    """Returns why the products of rows with their experts' weights are not right on this device; None if they are."""

    def proof() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        import torch

        generator = torch.Generator().manual_seed(0)
        # An expert without a row, one with a single row, and a ragged rest.
        ends = torch.tensor([0, 1, 40, 96], dtype=torch.int32)
        given = {"x": (96, 256), "w": (4, 256, 128)}
        made = {name: torch.randn(shape, generator=generator) for name, shape in given.items()}
        ours, theirs = _twice(made, device, torch.bfloat16)
        found = torch.nn.functional.grouped_mm(ours["x"], ours["w"], offs=ends.to(device))
        pairs = itertools.pairwise([0, *ends.tolist()])
        wanted = torch.cat([theirs["x"][begin:end] @ theirs["w"][n] for n, (begin, end) in enumerate(pairs)])
        yield from _compare(found, wanted, ours, theirs)

    return _fault(proof)


def _gated_delta_rule(kernel: Any, device: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = _BORDERS[-1]

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(1, tokens, *shape, generator=generator)

    made = {
        "q": drawn(_KEY_HEADS, _HEAD_SIZE),
        "k": drawn(_KEY_HEADS, _HEAD_SIZE),
        "v": drawn(_VALUE_HEADS, _HEAD_SIZE),
        "beta": drawn(_VALUE_HEADS).sigmoid(),
        "g": -drawn(_VALUE_HEADS).exp() * 0.1,
    }
    ours, theirs = _twice(made, device, torch.bfloat16, kept=("g",))
    ends = torch.tensor(_BORDERS, device=device, dtype=torch.int32)
    options = {"use_qk_l2norm_in_kernel": True}
    found = kernel(ours["q"], ours["k"], ours["v"], g=ours["g"], beta=ours["beta"], cu_seqlens=ends, **options)[0]
    plain = _plain(kernel)
    texts = []
    for begin, end in itertools.pairwise(_BORDERS):
        text = {name: tensor[:, begin:end] for name, tensor in theirs.items()}
        texts.append(plain(text["q"], text["k"], text["v"], g=text["g"], beta=text["beta"], **options)[0])
    yield from _compare(found, torch.cat(texts, dim=1), ours, theirs)


def _convolution(kernel: Any, device: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    channels, tokens = 2 * _KEY_HEADS * _HEAD_SIZE, _BORDERS[-1]
    made = {
        # Channels last, as the projection before it leaves them.
        "x": torch.randn(1, tokens, channels, generator=generator),
        "w": torch.randn(channels, 4, generator=generator) * 0.5,
    }
    ours, theirs = _twice(made, device, torch.bfloat16)
    texts = [torch.full((end - begin,), n) for n, (begin, end) in enumerate(itertools.pairwise(_BORDERS))]
    number = torch.cat(texts).to(device=device, dtype=torch.int32)[None]
    found = kernel(ours["x"].transpose(1, 2), ours["w"], None, activation="silu", seq_idx=number)
    plain = _plain(kernel)
    wanted = torch.cat(
        [
            plain(theirs["x"][:, begin:end].transpose(1, 2), theirs["w"], None, activation="silu")
            for begin, end in itertools.pairwise(_BORDERS)
        ],
        dim=2,
    )
    yield from _compare(found, wanted, ours, theirs)


def _plain(kernel: Any) -> Any:
    """Returns the plain PyTorch that transformers has wrapped in its choice of kernels."""
    while hasattr(kernel, "__wrapped__"):
        kernel = kernel.__wrapped__
    return kernel


def _twice(made: _Tensors, device: str, dtype: torch.dtype, kept: tuple[str, ...] = ()) -> tuple[_Tensors, _Tensors]:
    """Returns the same numbers for the kernel (in `dtype` but for `kept`) and for plain float32."""
    import torch

    ours = {name: value.to(device, torch.float32 if name in kept else dtype) for name, value in made.items()}
    theirs = {name: value.float().clone().requires_grad_(True) for name, value in ours.items()}
    return {name: value.requires_grad_(True) for name, value in ours.items()}, theirs


def _compare(
    found: torch.Tensor, wanted: torch.Tensor, ours: _Tensors, theirs: _Tensors
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yields what must be equal up to rounding: the output, then each gradient."""
    import torch

    yield "the output", found, wanted
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(wanted)
    found.backward(gradient.to(found.dtype))
    wanted.backward(gradient)
    for name, tensor in ours.items():
        expected = theirs[name].grad
        assert expected is not None
        # What a kernel leaves out of its backward has no gradient.
        yield f"the gradient of {name}", expected * 0 if tensor.grad is None else tensor.grad, expected


def _fault(proof: Callable[[], Iterator[tuple[str, torch.Tensor, torch.Tensor]]]) -> str | None:
    """Runs a proof; returns what it raises or what is off, in words."""
    try:
        for what, found, wanted in proof():
            off = distance(found.detach().double(), wanted.detach().double())
            # NaN is never close.
            if not off <= _ROUNDING:
                return f"{what} is off by {off:.0%}"
    except Exception as error:  # kernels raise what they like: compilers, drivers, asserts
        if is_out_of_memory(error) or broken_part(error) == "GPU":
            raise
        return f"{type(error).__name__}: {in_brief(error)}"
    return None


def _versions(distribution: str, device: str) -> str:
    """Names the kernels' package, Triton and the card."""
    import torch

    named = [f"{distribution} {_version(distribution)}", f"Triton {_version('triton')}"]
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        named.append(f"compute capability {major}.{minor}")
    return ", ".join(named)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "of an unknown version"
