"""Fused experts in 4 bits: quantised layer by layer while loading, multiplied in groups, kept packed for backward.

transformers keeps all experts of a layer in one 3-D parameter, which `load_in_4bit` silently skips: of
Qwen3-Next-80B-A3B 97 % would stay in bf16. This module registers three things with transformers, by mechanism and not
by model name: a quantisation config, a quantizer that also handles such parameters, and an experts function that
multiplies with them. Every module made by `use_experts_implementation` is supported, with or without gate, bias and
transposition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import bitsandbytes.functional as bnb
import torch
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from training.quantization.chosen_rows import Routing, from_experts, to_experts
from training.quantization.grouped_product import (
    UNPACKED,
    Choice,
    Groups,
    Implementation,
    Kind,
    grouped_product,
    product_of_few_rows,
)
from training.quantization.nf4 import BLOCK, PIECE_ELEMENTS, fills_blocks, pack, pieces_of

METHOD = "nf4_with_experts"
EXPERTS_FUNCTION = "nf4_grouped"
_STATES = "nf4_states"
_UNPACKED = "nf4_unpacked"
_HELD = "nf4_held"
_CHOICE = "nf4_product"


@register_quantization_config(METHOD)
class Nf4Config(BitsAndBytesConfig):
    """NF4 with double quantisation for both linear layers and fused experts."""

    def __init__(self, compute_dtype: torch.dtype, skip_modules: list[str]) -> None:
        super().__init__(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=skip_modules,
        )
        self.quant_method = METHOD  # type: ignore[assignment]


@register_quantizer(METHOD)
class Nf4Quantizer(Bnb4BitHfQuantizer):
    """bitsandbytes' quantizer, extended to the 3-D parameters of fused experts."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        return is_expert_weight(module, name) or bool(super().param_needs_quantization(model, param_name, **kwargs))

    def _process_model_before_weight_loading(self, model: Any, *arguments: Any, **options: Any) -> None:
        """Refuses a model that would not become 4-bit before hundreds of gigabytes are read, while it is a skeleton."""
        super()._process_model_before_weight_loading(model, *arguments, **options)
        # Imported here because it asks this module what experts are.
        from training.quantization.weights_to_pack import refuse_what_is_left

        refuse_what_is_left(
            model, type(model).__name__, lambda _module, _name, path: self.param_needs_quantization(model, path)
        )

    def get_quantize_ops(self) -> Nf4Quantize:
        return Nf4Quantize(self)  # type: ignore[no-untyped-call]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """If the checkpoint holds experts one by one, packs them one by one instead of stacking them first."""
        conversions: list[Any] = super().update_weight_conversions(  # type: ignore[no-untyped-call]
            weight_conversions, model
        )
        return [_packing(conversion, model) for conversion in conversions]


class PackingConverter(WeightConverter):
    """Passes on the readers of single experts, where the library would read all experts of a layer at once."""

    # Empty, or the class would get a __dict__ that its base does not have.
    __slots__ = ()

    def materialize_tensors(self) -> dict[str, Any]:
        # Readers, not futures: transformers loads without threads while it quantises.
        return {pattern: self.collected_tensors.pop(pattern) for pattern in list(self.collected_tensors)}


class PackExperts(ConversionOps):
    """Replaces stack and concatenate: reads and packs a few experts at a time, and frees them.

    So a layer's experts are never all in 16 bits at once, on the host or on the GPU.
    """

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, list[Callable[[], torch.Tensor]]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str,
        model: Any,
        **_kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        module, name = get_module_from_name(model, full_layer_name)
        # The order of the sources is their order in the fused weight: gate before up.
        readers = [input_dict.pop(pattern) for pattern in source_patterns if pattern in input_dict]
        pieces = _read_experts(readers)
        first = next(pieces)
        shape = torch.Size((len(readers[0]), *first.shape[1:]))
        packed, state = pack(chain((first,), pieces), shape, first.dtype, first.device)
        expert_states(module)[name] = state
        return {target_patterns[0]: torch.nn.Parameter(packed, requires_grad=False)}


def _read_experts(readers: list[list[Callable[[], torch.Tensor]]]) -> Iterator[torch.Tensor]:
    """Yields whole experts in order, several at a time if they are small."""
    waiting: list[torch.Tensor] = []
    for parts in zip(*readers, strict=True):
        waiting.append(torch.cat([read() for read in parts]))
        if len(waiting) * waiting[0].numel() >= PIECE_ELEMENTS:
            yield torch.stack(waiting)
            waiting.clear()
    if waiting:
        yield torch.stack(waiting)


def _packing(conversion: Any, model: Any) -> Any:
    """Returns the conversion itself, or one that packs if it would fuse single experts."""
    kinds = [type(operation) for operation in getattr(conversion, "operations", ())]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]) or not _targets_experts(conversion, model):
        return conversion
    packing = PackingConverter(
        list(conversion._original_source_patterns), list(conversion._original_target_patterns), [PackExperts()]
    )
    packing.scope_prefix, packing.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return packing


def _targets_experts(conversion: Any, model: Any) -> bool:
    """Returns True if the conversion makes fused experts and each single expert fills whole blocks."""
    names = {target.rpartition(".")[2] for target in conversion.target_patterns}
    modules = [module for module in model.modules() if has_fused_experts(module)]
    weights = [module._parameters[name] for module in modules for name in names if name in module._parameters]
    return bool(weights) and all(
        weight is not None and weight.dim() == 3 and weight[0].numel() % BLOCK == 0 for weight in weights
    )


class Nf4Quantize(Bnb4bitQuantize):
    """from_pretrained calls it with one whole parameter, as soon as it is assembled from the checkpoint."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        for path, value in input_dict.items():
            module, name = get_module_from_name(model, path)
            if not is_expert_weight(module, name):
                result |= super().convert({path: value}, full_layer_name=full_layer_name, model=model, **kwargs)
                continue
            weight = value[0] if isinstance(value, list) else value
            # Already packed if the experts came one by one; whole if the checkpoint holds them fused.
            result[path] = weight if name in expert_states(module) else quantise_experts(module, name, weight)
            module._is_hf_initialized = True
        return result


def has_fused_experts(module: torch.nn.Module) -> bool:
    """True for a module decorated by `use_experts_implementation`: all experts of a layer in 3-D parameters."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate") and "down_proj" in module._parameters


def is_expert_weight(module: torch.nn.Module, name: str) -> bool:
    if not has_fused_experts(module) or name not in ("gate_up_proj", "up_proj", "down_proj"):
        return False
    parameter = module._parameters[name]
    # Three axes before quantisation, packed bytes after.
    return parameter is not None and (parameter.dim() == 3 or name in expert_states(module))


def expert_states(module: torch.nn.Module) -> dict[str, bnb.QuantState]:
    """Returns how to unpack a module's experts, by parameter name; empty before they are quantised."""
    states: dict[str, bnb.QuantState] = module.__dict__.setdefault(_STATES, {})
    return states


def unpacked_experts(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns a module's experts that stay unpacked (training.quantization.dequantized_cache), by parameter name."""
    weights: dict[str, torch.Tensor] = module.__dict__.setdefault(_UNPACKED, {})
    return weights


def unpack_once_for_backward(model: torch.nn.Module) -> None:
    """Lets backward reuse what recomputing unpacks, for a model that recomputes its activations layer by layer.

    What a layer saves while it is recomputed is freed when its backward is done, and what it saves before that is
    dropped at once. So one layer's experts are held at a time, and they are unpacked twice per micro-batch instead of
    three times. Without recomputing, every layer's would be held.
    """
    for module in model.modules():
        if has_fused_experts(module):
            module.__dict__[_HELD] = True


def recomputes(module: torch.nn.Module) -> bool:
    """True after `unpack_once_for_backward`."""
    return bool(module.__dict__.get(_HELD, False))


def set_product(module: torch.nn.Module, choice: Choice | None) -> None:
    """Says how a module's experts are multiplied (training.quantization.choose_product). None: by unpacking them."""
    module.__dict__[_CHOICE] = choice


def _product_for(module: torch.nn.Module, rows: int) -> Implementation:
    choice: Choice | None = module.__dict__.get(_CHOICE)
    return UNPACKED if choice is None else choice.of(rows)


def quantise_experts(module: torch.nn.Module, name: str, weight_EOI: torch.Tensor) -> torch.nn.Parameter:
    """Packs one expert parameter and stores its state on the module. The caller puts the result in its place."""
    packed, state = pack(pieces_of(weight_EOI), weight_EOI.shape, weight_EOI.dtype, weight_EOI.device)
    expert_states(module)[name] = state
    return torch.nn.Parameter(packed, requires_grad=False)


def nf4_grouped_experts(
    module: Any, hidden_ND: torch.Tensor, chosen_NK: torch.Tensor, weight_NK: torch.Tensor
) -> torch.Tensor:
    """Sends every token through its K experts: sort by expert, one grouped product up, one down, sort back, sum.

    The arithmetic of transformers' own `grouped_mm`, with weights that are unpacked when needed.
    """
    routing = Routing(chosen_NK)
    implementation = _product_for(module, chosen_NK.numel())
    rows_SD = to_experts(hidden_ND, routing, is_fused=implementation.moves_rows)
    # histc, in float on the CPU: bincount is not deterministic, and integer histc does not exist there.
    counted = routing.expert_S.float() if hidden_ND.device.type == "cpu" else routing.expert_S.int()
    count_E = torch.histc(counted, bins=module.num_experts, min=0, max=module.num_experts - 1)
    groups = Groups(torch.cumsum(count_E, dim=0, dtype=torch.int32))

    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    middle_SI = _multiply(module, up_name, rows_SD, groups, routing.expert_S)
    middle_SI = module._apply_gate(middle_SI) if module.has_gate else module.act_fn(middle_SI)
    out_SD = _multiply(module, "down_proj", middle_SI, groups, routing.expert_S)
    if module.has_post_expert_norm:
        out_SD = module.post_expert_norm(out_SD)
    return from_experts(out_SD, weight_NK, routing, is_fused=implementation.moves_rows).to(hidden_ND.dtype)


def _multiply(module: Any, name: str, rows: torch.Tensor, groups: Groups, expert_S: torch.Tensor) -> torch.Tensor:
    unpacked = unpacked_experts(module).get(name)
    stored, state = (module._parameters[name], expert_states(module)[name]) if unpacked is None else (unpacked, None)
    implementation = _product_for(module, rows.shape[0])
    if state is not None and implementation.kind is Kind.UNPACKED and _are_few(rows, state):
        product = product_of_few_rows(rows, stored, state, expert_S, is_transposed=module.is_transposed)
    else:
        product = grouped_product(
            rows,
            stored,
            state,
            groups,
            implementation,
            is_transposed=module.is_transposed,
            is_held=recomputes(module),
        )
    if module.has_bias:
        product = product + getattr(module, f"{name}_bias")[expert_S]
    return product


def _are_few(rows: torch.Tensor, state: Any) -> bool:
    """True if it takes less to unpack each row's own expert than all: when an answer is generated word by word."""
    needs_gradient = torch.is_grad_enabled() and rows.requires_grad
    return not needs_gradient and 2 * rows.shape[0] <= state.shape[0] and fills_blocks(state.shape)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_FUNCTION, nf4_grouped_experts)
