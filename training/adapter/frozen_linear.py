"""LoRA beside a frozen linear layer as one autograd function: less memory traffic, less kept for backward.

PEFT computes the adapter in float32 (the type of its weights), copies the base layer's output, and adds to it in four
passes over memory. Here the adapter's product is added to the base layer's output inside the product itself, in the
type of the activations; the weights stay float32. For backward only the layer's input is kept, which its neighbours
keep as well, and tokens × rank numbers: no copy of the input in float32, no dropped input, no dropout mask. A mask is
drawn again from its seed, and a 4-bit weight is unpacked again.

The seed comes from torch's generator of the CPU. So recomputing activations, which restores that generator, draws the
same mask, and so does a resumed run, which seeds it for each step.

Only what a job computes is done here. With several adapters at once, a merged one, DoRA, autocast and the like the
layers do what PEFT's own do.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import Linear4bit as PeftLinear4bit
from torch.autograd.function import once_differentiable

from training.quantization.dequantized_cache import unpacked_weight


def use_one_function(model: torch.nn.Module) -> int:
    """Lets the LoRA layers of a model compute in one function; returns how many do. Names and weights stay as they are.

    Call it when the adapter is attached.
    """
    count = 0
    for module in model.modules():
        kind = _KINDS.get(type(module))
        if kind is not None and _is_plain(module.get_base_layer()):  # type: ignore[operator]
            # Not a new module: PEFT, checkpoints and the adapter's file know this one.
            module.__class__ = kind
            count += 1
    return count


class _OneFunction:
    """The forward of a LoRA layer of PEFT, in one function where that is the same thing."""

    def forward(self: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        adapter = None if arguments or options else _only_adapter(self, x)
        if adapter is None:
            result: torch.Tensor = super().forward(x, *arguments, **options)  # type: ignore[misc]
            return result
        dropout = self.lora_dropout[adapter]
        result = _LoraOnFrozenLinear.apply(  # type: ignore[no-untyped-call]
            x,
            self.lora_A[adapter].weight,
            self.lora_B[adapter].weight,
            self.get_base_layer(),
            self.scaling[adapter],
            dropout.p if dropout.training and isinstance(dropout, torch.nn.Dropout) else 0.0,
        )
        return result


class FrozenLinearWithLora(_OneFunction, PeftLinear):  # type: ignore[misc]
    """A linear layer in 16 or 32 bits."""


class Frozen4bitLinearWithLora(_OneFunction, PeftLinear4bit):  # type: ignore[misc]
    """A linear layer that bitsandbytes keeps in 4 bits."""


_KINDS: dict[type, type] = {PeftLinear: FrozenLinearWithLora, PeftLinear4bit: Frozen4bitLinearWithLora}


def _is_plain(base: torch.nn.Module) -> bool:
    """True for a frozen layer whose gradient we know. (PEFT also puts these classes around GPT-2's Conv1D.)"""
    return (type(base) is torch.nn.Linear or isinstance(base, Linear4bit)) and not any(
        parameter.requires_grad for parameter in base.parameters()
    )


def _only_adapter(layer: Any, x: torch.Tensor) -> str | None:
    """Returns the adapter's name if one plain LoRA is at work, computed in the type of `x`."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return None
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return None
    return str(name) if x.dtype == _type_of(layer.get_base_layer(), x) else None


def _type_of(base: Any, x: torch.Tensor) -> torch.dtype:
    """The type that a frozen layer multiplies in. A 4-bit layer chooses it by its first input."""
    kept = unpacked_weight(base)
    if kept is not None:
        return kept.dtype
    if not isinstance(base, Linear4bit):
        dtype: torch.dtype = base.weight.dtype
        return dtype
    return base.compute_dtype if base.compute_type_is_set and base.compute_dtype is not None else x.dtype


class _LoraOnFrozenLinear(torch.autograd.Function):
    """x @ weight.T + bias + scaling * dropout(x) @ A.T @ B.T, with gradients for x, A and B."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes its arguments by position
        ctx: Any,
        x: torch.Tensor,
        a_RI: torch.Tensor,
        b_OR: torch.Tensor,
        base: Any,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        out_NO: torch.Tensor = base(x_NI)
        narrow_RI, narrow_OR = a_RI.to(x.dtype), b_OR.to(x.dtype)
        seed = _new_seed() if dropout else None
        dropped_NI = x_NI if seed is None else x_NI * _kept(x_NI, dropout, seed)
        inner_NR = dropped_NI @ narrow_RI.t()
        # Dropout's own factor is part of this one.
        factor = scaling / (1 - dropout)
        out_NO.addmm_(inner_NR, narrow_OR.t(), alpha=factor)
        stored, state = _frozen_weight(base)
        ctx.save_for_backward(x_NI, narrow_RI, narrow_OR, inner_NR, stored)
        ctx.state, ctx.seed, ctx.dropout, ctx.factor = state, seed, dropout, factor
        ctx.shape, ctx.trained_dtype = x.shape, a_RI.dtype
        return out_NO.view(*x.shape[:-1], out_NO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, narrow_RI, narrow_OR, inner_NR, stored = ctx.saved_tensors
        needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        grad_x = grad_a_RI = grad_b_OR = None
        grad_NO = grad.reshape(-1, grad.shape[-1])
        kept_NI = None if ctx.seed is None else _kept(x_NI, ctx.dropout, ctx.seed)
        if needs_b:
            grad_b_OR = _product(grad_NO.t(), inner_NR, ctx.factor).to(ctx.trained_dtype)
        grad_NR = _product(grad_NO, narrow_OR, ctx.factor)
        if needs_a:
            dropped_NI = x_NI if kept_NI is None else x_NI * kept_NI
            grad_a_RI = (grad_NR.t() @ dropped_NI).to(ctx.trained_dtype)
            del dropped_NI
        if needs_x:
            weight_OI = stored if ctx.state is None else bnb.dequantize_4bit(stored, ctx.state).to(grad.dtype)
            grad_NI = grad_NO @ weight_OI
            del weight_OI
            if kept_NI is None:
                grad_NI.addmm_(grad_NR, narrow_RI)
            else:
                grad_NI.addcmul_(grad_NR @ narrow_RI, kept_NI)
            grad_x = grad_NI.view(ctx.shape)
        return grad_x, grad_a_RI, grad_b_OR, None, None, None


def _frozen_weight(base: Any) -> tuple[torch.Tensor, bnb.QuantState | None]:
    """Returns the weight as it is stored, and how to unpack it; None if it is not packed."""
    kept = unpacked_weight(base)
    if kept is not None:
        return kept, None
    if not isinstance(base, Linear4bit):
        return base.weight.data, None
    # A sharded parameter loses its state; the layer keeps it (training.base.sharded).
    return base.weight.data, getattr(base.weight, "quant_state", None) or base.quant_state


def _product(left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * left @ right, in one kernel."""
    return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=factor)


def _new_seed() -> int:
    return int(torch.empty((), dtype=torch.int64).random_())


def _kept(x_NI: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """Returns ones where dropout keeps an element, else zeros: the same for the same seed, shape and device."""
    generator = torch.Generator(x_NI.device).manual_seed(seed)
    if x_NI.device.type != "cpu":
        return torch.empty(x_NI.shape, dtype=torch.bool, device=x_NI.device).bernoulli_(
            1 - dropout, generator=generator
        )
    # On a CPU bernoulli_ takes longer than everything else that an adapter does forward. So 16 bits decide on an
    # element, four elements are drawn at once, and the mask has the type of the product: a fifth of the time.
    fours = torch.empty(-(-x_NI.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    drawn_NI = fours.view(torch.int16)[: x_NI.numel()].view(x_NI.shape)
    return torch.ge(drawn_NI, round(dropout * 2**16) - 2**15, out=torch.empty_like(x_NI))
