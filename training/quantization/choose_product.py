"""Chooses how a job's experts are multiplied: by trying on the GPU, at the start of the job, on the job's own shapes.

Right before fast. Each implementation must first give what the reference gives, forward and backward, on this very GPU
and with these weights; otherwise it is left out and the story says why. Of the others the fastest is taken, for large
and for small micro-batches separately. On a CPU nothing is tried: experts are unpacked and multiplied in groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from training.quantization.chosen_rows import Routing, from_experts, to_experts
from training.quantization.experts import expert_states, has_fused_experts, nf4_grouped_experts, recomputes, set_product
from training.quantization.grouped_product import (
    REFERENCE,
    UNPACKED,
    Choice,
    Groups,
    Implementation,
    Kind,
    multiply,
    reference_product,
)

# All timing of one kind of layer together. Compiling comes on top, once for each volume (TRITON_CACHE_DIR).
_SECONDS = 1.0
_MOST_RUNS = 10
# The smaller size that is tried: micro-batches at the end of a step, and after memory ran out, have fewer tokens.
_SMALLER = 4
# bf16 products begin on Ampere.
_LEAST_CAPABILITY = (8, 0)
# How configurations call the number of experts of a token.
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")

Candidates = Callable[[torch.nn.Module, int], Sequence[Implementation]]


@dataclass(frozen=True)
class Trial:
    """One implementation at one size: the seconds of a layer's experts in a micro-batch, or why it is left out."""

    tokens: int
    implementation: Implementation
    seconds: float | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Tried:
    """What was tried for all layers of one shape, and what was chosen; no trials if an earlier choice was kept."""

    shape: str
    layers: int
    choice: Choice
    trials: tuple[Trial, ...]

    @property
    def faults(self) -> dict[str, str]:
        """Why implementations were left out, by their names."""
        return {str(trial.implementation): trial.fault for trial in self.trials if trial.fault is not None}

    @property
    def milliseconds(self) -> dict[str, dict[str, float]]:
        """By tokens, then by implementation."""
        times: dict[str, dict[str, float]] = {}
        for trial in self.trials:
            if trial.seconds is not None:
                times.setdefault(str(trial.tokens), {})[str(trial.implementation)] = round(1e3 * trial.seconds, 3)
        return times

    def __str__(self) -> str:
        names = list(dict.fromkeys(str(chosen) for _, chosen in reversed(self.choice.by_rows)))
        times = "; ".join(
            f"{tokens} tokens: " + ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in by_name.items())
            for tokens, by_name in reversed(self.milliseconds.items())
        )
        return (
            f"the experts of {self.layers} layers are multiplied by the implementation {' or '.join(names)} "
            f"({times or 'as in the attempt before'})"
        )


def choose_products(
    model: torch.nn.Module,
    tokens: int,
    candidates: Candidates | None = None,
    *,
    earlier: Mapping[str, Choice] | None = None,
) -> list[Tried]:
    """Chooses for every layer with packed experts, for micro-batches of up to this many tokens.

    `earlier`, by shape, is what an interrupted attempt chose. It is kept if it is right here too, so that a resumed run
    computes as the uninterrupted one would have.
    """
    tried = []
    for shape, modules in _layers_by_shape(model).items():
        kept = (earlier or {}).get(shape)
        if kept is not None and not _faults(modules[0], list(dict(kept.by_rows).values()), kept.by_rows[-1][0]):
            found = Tried(shape, len(modules), kept, ())
        else:
            choice, trials = _try_layer(modules[0], tokens, candidates or candidates_of)
            found = Tried(shape, len(modules), choice, trials)
        for module in modules:
            set_product(module, found.choice)
        tried.append(found)
    if torch.cuda.is_available():
        # What the trials took is not left to the allocator: the slowest of them needs the most.
        torch.cuda.empty_cache()
    return tried


def candidates_of(module: torch.nn.Module, rows: int) -> Sequence[Implementation]:
    """Returns what could multiply this many rows with a module's experts here. The first is today's plain way."""
    states = expert_states(module).values()
    device = next(module.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY or not find_spec("triton"):
        return (UNPACKED,)
    from training.quantization.fused_product import tile_rows_for, why_not_fused

    unpacked = (UNPACKED, Implementation(Kind.UNPACKED, moves_rows=True))
    if any(why_not_fused(state) for state in states):
        return unpacked
    heights = tile_rows_for(rows, next(iter(states)).shape[0])
    return (*unpacked, *(Implementation(Kind.FUSED, height, moves_rows=True) for height in heights))


def _layers_by_shape(model: torch.nn.Module) -> dict[str, list[torch.nn.Module]]:
    layers: dict[str, list[torch.nn.Module]] = {}
    for module in model.modules():
        if has_fused_experts(module) and expert_states(module):
            shape = ", ".join(f"{name} {tuple(state.shape)}" for name, state in expert_states(module).items())
            layers.setdefault(shape, []).append(module)
    return layers


def _try_layer(module: torch.nn.Module, tokens: int, candidates: Candidates) -> tuple[Choice, tuple[Trial, ...]]:
    per_token = _experts_of_a_token(module)
    by_size = {
        size: list(candidates(module, size * per_token))
        for size in sorted({max(1, tokens // _SMALLER), max(1, tokens)})
    }
    everyone = list(dict.fromkeys(implementation for each in by_size.values() for implementation in each))
    faults = _faults(module, everyone, tokens * per_token)
    trials, chosen = [], []
    for size, implementations in by_size.items():
        right = [each for each in implementations if each not in faults]
        trials += [Trial(size, each, fault=faults[each]) for each in implementations if each in faults]
        timed = [_time(module, size, each, _SECONDS / len(right) / len(by_size)) for each in right]
        trials += timed
        fastest = min((trial for trial in timed if trial.seconds is not None), key=_seconds_of, default=None)
        # With none that is right, what is right by definition. With none that fits into memory, the usual way: the
        # trainer takes smaller micro-batches then.
        otherwise = UNPACKED if UNPACKED in right else REFERENCE
        chosen.append((size * per_token, otherwise if fastest is None else fastest.implementation))
    return Choice(tuple(chosen)), tuple(trials)


def _seconds_of(trial: Trial) -> float:
    return float("inf") if trial.seconds is None else trial.seconds


def _faults(module: torch.nn.Module, implementations: Sequence[Implementation], rows: int) -> dict[Implementation, str]:
    """Compares each implementation with the reference: both weights, forward and backward, unequal groups of rows.

    Empty experts, an expert with one row and ragged ends are always among them.
    """
    faults: dict[Implementation, str] = {}
    for name, state in expert_states(module).items():
        packed = module.get_parameter(name)
        groups = Groups(_uneven_ends(state.shape[0], rows, packed.device))
        for along in (True, False):
            rows_SI = _random((rows, state.shape[-1 if along else -2]), state.dtype, packed.device)
            expected = reference_product(rows_SI, packed, state, groups.ends_E, along=along)
            for implementation in implementations:
                if implementation in faults:
                    continue
                fault = _fault_of(
                    f"a row of {name}",
                    partial(multiply, rows_SI, packed, state, groups, implementation, along=along),
                    expected,
                    state.dtype,
                )
                if fault is not None:
                    faults[implementation] = fault
    if any(implementation.moves_rows for implementation in implementations):
        fault = _fault_of_moving(module, rows)
        if fault is not None:
            faults.update((each, fault) for each in implementations if each.moves_rows and each not in faults)
    return faults


def _fault_of_moving(module: torch.nn.Module, rows: int) -> str | None:
    """Compares the kernels that move rows with torch's operations in float32: both ways, with their gradients."""
    state = next(iter(expert_states(module).values()))
    device, k = next(module.parameters()).device, _experts_of_a_token(module)
    scores_NE = _random((max(1, rows // k), state.shape[0]), torch.float32, device)
    weight_NK, chosen_NK = scores_NE.softmax(dim=1).to(state.dtype).topk(k, dim=1)
    hidden_ND = _random((chosen_NK.shape[0], _width(module)), state.dtype, device)
    expected = moved_there_and_back(hidden_ND, weight_NK, chosen_NK, torch.float32, is_fused=False)
    actual = partial(moved_there_and_back, hidden_ND, weight_NK, chosen_NK, state.dtype, is_fused=True)
    return _fault_of("a token's rows or their gradient, moved by kernels,", actual, expected, state.dtype)


def moved_there_and_back(
    hidden_ND: torch.Tensor, weight_NK: torch.Tensor, chosen_NK: torch.Tensor, dtype: torch.dtype, *, is_fused: bool
) -> torch.Tensor:
    """Returns what tokens get if experts do nothing, and the gradients of tokens and weights, one row for each."""
    routing = Routing(chosen_NK)
    hidden_ND, weight_NK = (tensor.detach().to(dtype).requires_grad_(True) for tensor in (hidden_ND, weight_NK))
    out_ND = from_experts(to_experts(hidden_ND, routing, is_fused=is_fused), weight_NK, routing, is_fused=is_fused)
    gradients = torch.autograd.grad(out_ND, (hidden_ND, weight_NK), hidden_ND.detach().roll(1, dims=0))
    tokens, width = hidden_ND.shape
    found = torch.zeros(3, tokens, width, device=hidden_ND.device)
    found[0], found[1], found[2, :, : routing.k] = out_ND.detach(), *gradients
    return found.view(3 * tokens, width)


def _fault_of(what: str, compute: Callable[[], torch.Tensor], expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    try:
        error = _largest_error(compute(), expected)
    except Exception as fault:  # noqa: BLE001 - whatever a compiler, a driver or a kernel raises
        return f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"
    # One part in 2**7 of a row for bf16, whose results differ by 2**-9 after rounding. NaN is not below anything.
    is_right = error <= max(torch.finfo(dtype).eps, 1e-5)
    return None if is_right else f"{what} differs from the reference by {error:.2g} of its length"


def _largest_error(product: torch.Tensor, expected: torch.Tensor) -> float:
    """By rows, so that one wrong tile among thousands shows. A row of nearly nothing counts as a hundredth."""
    length = expected.norm(dim=1)
    difference = (product.float() - expected).norm(dim=1)
    return float((difference / length.clamp(min=1e-2 * float(length.mean()))).nan_to_num(torch.inf).max())


def _time(module: torch.nn.Module, tokens: int, implementation: Implementation, most_seconds: float) -> Trial:
    """Times what a micro-batch does with a layer's experts: forward, and once more before backward if it recomputes."""
    set_product(module, Choice(((tokens, implementation),)))
    try:
        return Trial(tokens, implementation, seconds=_seconds(module, tokens, most_seconds))
    except torch.OutOfMemoryError:
        return Trial(tokens, implementation, fault="there is not enough memory for it")


def _seconds(module: torch.nn.Module, tokens: int, most_seconds: float) -> float:
    state = next(iter(expert_states(module).values()))
    device, experts = next(module.parameters()).device, state.shape[0]
    hidden_ND = _random((tokens, _width(module)), state.dtype, device).requires_grad_(True)
    scores_NE = _random((tokens, experts), torch.float32, device)
    weight_NK, chosen_NK = scores_NE.softmax(dim=1).topk(_experts_of_a_token(module), dim=1)
    best, spent = float("inf"), 0.0
    for run in range(_MOST_RUNS + 1):
        _wait(device)
        began = time.perf_counter()
        if recomputes(module):
            with torch.no_grad():
                nf4_grouped_experts(module, hidden_ND, chosen_NK, weight_NK)
        nf4_grouped_experts(module, hidden_ND, chosen_NK, weight_NK).sum().backward()
        _wait(device)
        seconds = time.perf_counter() - began
        hidden_ND.grad = None
        # The first run compiles and fills caches.
        if run:
            best, spent = min(best, seconds), spent + seconds
            if spent > most_seconds:
                break
    return best


def _width(module: torch.nn.Module) -> int:
    """A token's."""
    down = expert_states(module)["down_proj"].shape
    return int(down[-1] if getattr(module, "is_transposed", False) else down[-2])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Leaves the job's own sequence of random numbers as it is."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def _uneven_ends(experts: int, rows: int, device: torch.device) -> torch.Tensor:
    """Cumulative rows by expert: the first has one row, every fourth none, the others unequal shares."""
    share_E = torch.rand(experts, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    if experts > 1:
        share_E[::4] = 0
    return ((share_E.cumsum(0) / share_E.sum() * (rows - 1)).round().int() + 1).to(device)


def _experts_of_a_token(module: torch.nn.Module) -> int:
    config: Any = module.config
    named: Iterator[Any] = (getattr(config, name, None) for name in _EXPERTS_OF_A_TOKEN)
    return int(next((number for number in named if isinstance(number, int)), 1))
