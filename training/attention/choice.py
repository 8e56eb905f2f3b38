"""Decides how a model attends in packed rows: by borders if that is proven equal to its own mask, and by which kernel.

Names of architectures decide nothing. The model reads one small packed row, and each of its layers is compared with its
own attention over the dense mask. A kernel is compared with the reference on the GPU that it runs on, forward and
backward, and timed on the job's own lengths; one that is wrong, missing or slower is not used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from training.attention.borders import Borders
from training.attention.registered import (
    NAMES,
    Attend,
    Observed,
    Shape,
    attends_by_borders,
    attention_of,
    chosen,
    observing,
    register,
)
from training.attention.text_by_text import attend_text_by_text
from training.attention.varlen import attend_varlen
from training.data.micro_batches import pack
from training.distance import distance
from training.failures import in_brief, is_out_of_memory

# Layers are compared in float32, where two orders of summation differ by 1e-7.
_MOST_ROUNDING_OF_A_LAYER = 1e-4
# Logits in the model's own type: 1.6 % between two layouts with SmolLM2-135M in bfloat16.
_MOST_ROUNDING_OF_LOGITS = 0.05
# Operands of bfloat16 and sums in float32 end within 1e-3 to 1e-2 of the same in float32.
_MOST_ROUNDING_OF_A_KERNEL = 2e-2
# Windows and chunks are thousands of tokens long. With these lengths instead, the small row has texts beyond them.
_SHORT = 3
_WINDOWS = ("sliding_window", "attention_chunk_size")
# Ragged on purpose: one token, one more than a kernel's block of 128, and two texts that end inside one.
_PROOF_LENGTHS, _PROOF_WINDOW = (1, 129, 67, 300), 100
_TIMED_TOKENS = 8192
# By kind of device. A CPU has none.
KERNELS: dict[str, Attend] = {"cuda": attend_varlen}
_REFUSALS = (ValueError, TypeError, NotImplementedError, RuntimeError, IndexError, AttributeError, KeyError)


@dataclass(frozen=True)
class Choice:
    """`dense_because` is None if the model attends by borders. `dropped` says of kernels why they are not used."""

    dense_because: str | None
    dropped: tuple[str, ...] = ()


def choose_packed_attention(model: Any, lengths: Sequence[int]) -> Choice:
    """Lets a model attend by borders in packed rows if that changes nothing. Otherwise the model stays as it was.

    `lengths` are those of the job's texts, for timing kernels.
    """
    register()
    original = attention_of(model)
    if original in NAMES.values():
        original = next(own for own, ours in NAMES.items() if ours == original)
        model.set_attn_implementation(original)
    reason, observed = _why_dense(model, original)
    if reason is not None:
        if attention_of(model) != original:
            model.set_attn_implementation(original)
        return Choice(reason)
    device = model.get_input_embeddings().weight.device
    # Where no text is longer than the window, layers with one attend without.
    shapes = observed.shapes | {replace(shape, has_window=False) for shape in observed.shapes}
    return _choose_kernels(shapes, device, lengths)


def _why_dense(model: Any, original: str | None) -> tuple[str | None, Observed]:
    observed = Observed()
    if original not in NAMES:
        return f"its attention is {original!r}, which is not replaced", observed
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _short_windows(model):
            row = _small_row(model)
            # Of one text, which both ways read alike: some architectures' dense masks leave out the borders.
            text = {"input_ids": row["input_ids"]}
            own = _logits(model, text)
            model.set_attn_implementation(NAMES[original])
            if not attends_by_borders(model):
                return "its attention cannot be replaced", observed
            with observing() as observed:
                model(**row, use_cache=False)
            ours = _logits(model, text)
    except _REFUSALS as error:
        if is_out_of_memory(error):
            raise
        return in_brief(error), observed
    finally:
        model.train(was_training)
    if observed.foreign is not None:
        return f"its layers ask their attention for {observed.foreign}", observed
    if not observed.differences:
        return "its mask says more than where texts begin and how far back they see", observed
    # A NaN is not close to anything.
    far = [difference for difference in observed.differences if not difference <= _MOST_ROUNDING_OF_A_LAYER]
    if far:
        return f"attention by borders differs in {len(far)} of its layers, by {far[0]:.1e}", observed
    differing = distance(ours, own)
    if not differing <= _MOST_ROUNDING_OF_LOGITS:
        return f"its logits differ by {differing:.1%} from those of its own attention", observed
    return None, observed


def _small_row(model: Any) -> dict[str, Any]:
    embeddings = model.get_input_embeddings()
    lengths = (7, 1, 5)
    ids = torch.arange(1, 1 + sum(lengths), device=embeddings.weight.device) % embeddings.num_embeddings
    return pack(list(ids.split(lengths)))


def _logits(model: Any, row: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = model(**row, use_cache=False).logits.float()
    return logits


@contextmanager
def _short_windows(model: Any) -> Iterator[None]:
    """Shortens windows while a small row is read. Masks take them from the configuration, each time."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    configs |= {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    kept = [
        (config, name, value)
        for config in configs.values()
        for name in _WINDOWS
        if isinstance(value := getattr(config, name, None), int)
    ]
    for config, name, _ in kept:
        setattr(config, name, _SHORT)
    try:
        yield
    finally:
        for config, name, value in kept:
            setattr(config, name, value)


def _choose_kernels(shapes: set[Shape], device: torch.device, lengths: Sequence[int]) -> Choice:
    """Proves and times the kernels of this device. Other shapes, and a CPU, attend text by text."""
    chosen.clear()
    dropped: dict[str, None] = {}
    kernel = KERNELS.get(device.type)
    if kernel is None:
        return Choice(None)
    for shape in sorted(shapes, key=repr):
        fault = fault_of(kernel, shape, device)
        if fault is None:
            ours, reference = (_seconds(attend, shape, device, lengths) for attend in (kernel, attend_text_by_text))
            if ours > reference:
                fault = f"it takes {ours * 1e3:.2f} ms where one text after the other takes {reference * 1e3:.2f} ms"
        if fault is None:
            chosen[shape] = kernel
        else:
            dropped[f"heads of {shape.key_size} numbers{' with a window' if shape.has_window else ''}: {fault}"] = None
    return Choice(None, tuple(dropped))


def fault_of(attend: Attend, shape: Shape, device: torch.device) -> str | None:
    """Compares a kernel with the reference in float32, forward and backward; None if they are equal up to rounding."""
    window = _PROOF_WINDOW if shape.has_window else None
    borders = borders_of_lengths(_PROOF_LENGTHS, window, device)
    heads, gradient, sinks = _random(shape, sum(_PROOF_LENGTHS), device)
    try:
        found = _forward_and_backward(attend, shape, heads, gradient, sinks=sinks, borders=borders)
    except _REFUSALS as error:
        return in_brief(error)
    exact = [head.detach().float().requires_grad_() for head in heads]
    wanted = _forward_and_backward(attend_text_by_text, shape, exact, gradient.float(), sinks=sinks, borders=borders)
    for name, ours, theirs in zip(("its result", "dQ", "dK", "dV"), found, wanted, strict=True):
        differing = distance(ours.float(), theirs)
        if not differing <= _MOST_ROUNDING_OF_A_KERNEL:
            return f"{name} differs by {differing:.1%} from the reference on this device"
    return None


def borders_of_lengths(lengths: Sequence[int], window: int | None, device: torch.device | str) -> Borders:
    """Returns borders that no model's mask gave, for measuring: `dense` has none to build."""
    ends = (0, *accumulate(lengths))
    return Borders(ends, torch.tensor(ends, dtype=torch.int32, device=device), window, dense=lambda: None)


def _random(
    shape: Shape, tokens: int, device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor | None]:
    source = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=source, device=device).to(shape.dtype)

    sizes = ((shape.heads, shape.key_size), (shape.key_heads, shape.key_size), (shape.key_heads, shape.value_size))
    # As projections leave them: tokens first in memory.
    heads = [normal(tokens, count, size).transpose(0, 1).requires_grad_() for count, size in sizes]
    sinks = normal(shape.heads) if shape.has_sinks else None
    return heads, normal(tokens, shape.heads, shape.value_size), sinks


def _forward_and_backward(
    attend: Attend,
    shape: Shape,
    heads: Sequence[torch.Tensor],
    gradient: torch.Tensor,
    *,
    sinks: torch.Tensor | None,
    borders: Borders,
) -> tuple[torch.Tensor, ...]:
    result = attend(*heads, borders, scale=shape.scale, softcap=shape.softcap, sinks_H=sinks)
    return (result.detach(), *torch.autograd.grad(result, tuple(heads), gradient))


def _seconds(attend: Attend, shape: Shape, device: torch.device, lengths: Sequence[int]) -> float:
    """Times one micro-batch's attention, forward and backward: the best of three, after a first that compiles."""
    timed = _of_one_micro_batch(lengths)
    longest = max(timed)
    borders = borders_of_lengths(timed, min(_PROOF_WINDOW, longest) if shape.has_window else None, device)
    heads, gradient, sinks = _random(shape, sum(timed), device)

    def run() -> float:
        begun = time.perf_counter()
        _forward_and_backward(attend, shape, heads, gradient, sinks=sinks, borders=borders)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    run()
    return min(run() for _ in range(3))


def _of_one_micro_batch(lengths: Sequence[int]) -> list[int]:
    taken: list[int] = []
    total = 0
    for length in lengths or (512,):
        if taken and total + length > _TIMED_TOKENS:
            break
        taken.append(min(length, _TIMED_TOKENS))
        total += length
    return taken
