"""The attention function that transformers calls, under our names, and the masks that its models make for it.

A packed row's mask becomes its borders (`training.attention.borders`); every other row is left to the attention that
the model was loaded with. So does a packed row whose mask or layer asks for more than borders can say: then the dense
mask is built after all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.attention.borders import Borders, borders_on, read_borders
from training.attention.text_by_text import attend_text_by_text
from training.distance import distance

# By what a model was loaded with: PyTorch's own attention, or the model's own, written out. Without the words "sdpa",
# "eager" and "flash", by which transformers recognises its own.
NAMES = {"sdpa": "packed_rows", "eager": "packed_rows_written_out"}

# THE from query_HTD, key_GTD, value_GTE, borders and how to weigh: the signature of `attend_text_by_text`.
Attend = Callable[..., torch.Tensor]

# What layers hand to their attention besides tensors and mask, and what does not change the result.
_WITHOUT_EFFECT = frozenset({
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k", "max_length_q",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids",
    "return_dict", "seq_idx", "sliding_window", "use_cache",
})  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Everything of a layer's attention on which a kernel's correctness and speed depend."""

    heads: int
    key_heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    scale: float
    softcap: float | None
    has_sinks: bool
    has_window: bool


@dataclass
class Observed:
    """What one forward pass of a model has shown: its shapes, and each layer's difference from a dense mask."""

    shapes: set[Shape] = field(default_factory=set)
    # One for each packed layer.
    differences: list[float] = field(default_factory=list)
    foreign: str | None = None


# Chosen on this device (training.attention.proof); attention of other shapes goes text by text.
chosen: dict[Shape, Attend] = {}
_observed: list[Observed] = []


def register() -> None:
    """Makes our names known to transformers. Registering again changes nothing."""
    for original, dense_mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        ALL_ATTENTION_FUNCTIONS.register(NAMES[original], partial(_attention, original))
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES[original], partial(_mask, dense_mask))


def attends_by_borders(model: Any) -> bool:
    """Returns True if a model's packed rows need no dense mask."""
    return attention_of(model) in NAMES.values()


def attention_of(model: Any) -> str | None:
    """Returns the name under which a model's attention is registered."""
    name: str | None = model.config.get_text_config()._attn_implementation
    return name


@contextmanager
def observing() -> Iterator[Observed]:
    """Compares each packed layer with the model's own attention meanwhile, in float32, and goes on with the latter."""
    observed = Observed()
    _observed.append(observed)
    try:
        yield observed
    finally:
        _observed.remove(observed)


def _mask(dense_mask: Callable[..., torch.Tensor | None], **asked: Any) -> torch.Tensor | None:
    """Returns borders in place of a packed row's mask: one row, all of it, and nothing masked but by a function."""
    dense = partial(dense_mask, **asked)
    length = asked["q_length"]
    is_packed = (
        # transformers says so of a row with several texts. Attention that is written out has a mask for any row, and
        # some of these architectures (gpt-oss) do not tell it of several texts.
        (not asked.get("allow_is_causal_skip", True) or dense_mask is eager_mask)
        and length > 1
        and not asked.get("use_vmap", False)
        and asked.get("attention_mask") is None
        and asked["batch_size"] == 1
        and asked["kv_length"] == length
        and asked.get("q_offset", 0) == 0
        and asked.get("kv_offset", 0) == 0
    )
    borders = (
        read_borders(asked["mask_function"], length, asked.get("local_size"), asked["device"], dense)
        if is_packed
        else None
    )
    return dense() if borders is None else borders.as_mask()


def _attention(  # noqa: PLR0917 - transformers' signature
    original: str,
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **asked: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    borders = borders_on(attention_mask)
    ends = asked.get("cu_seq_lens_q")
    if borders is not None and ends is not None:
        borders = borders.divided_at(ends)
    own = partial(_own_attention(original, module), module, query_BHTD, key_BGTD, value_BGTE)
    if borders is None:
        return own(attention_mask, **asked)  # type: ignore[no-any-return]
    foreign = _foreign(asked)
    observed = _observed[-1] if _observed else None
    if key_BGTD.shape[2] != borders.ends[-1]:
        # A cache that is longer than what it holds.
        foreign = foreign or "more keys than the row has"
    if foreign is not None:
        if observed is not None:
            observed.foreign = foreign
        return own(borders.dense(), **asked)  # type: ignore[no-any-return]
    if observed is not None:
        layer = partial(_own_attention(original, module), module)
        return _compare(observed, layer, (query_BHTD, key_BGTD, value_BGTE), borders, asked)
    return _attend(query_BHTD, key_BGTD, value_BGTE, borders, asked), None


def _own_attention(original: str, module: torch.nn.Module) -> Callable[..., Any]:
    if original == "sdpa":
        return sdpa_attention_forward
    written_out: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return written_out


def _foreign(asked: dict[str, Any]) -> str | None:
    """Names what a layer asks of its attention that borders and weights cannot say; None if there is nothing."""
    if asked.get("dropout"):
        return "dropout"
    ours = {"dropout", "scaling", "softcap", "s_aux"} | _WITHOUT_EFFECT
    return next((name for name, value in asked.items() if name not in ours and value is not None), None)


def _attend(
    query_BHTD: torch.Tensor, key_BGTD: torch.Tensor, value_BGTE: torch.Tensor, borders: Borders, asked: dict[str, Any]
) -> torch.Tensor:
    heads = (query_BHTD[0], key_BGTD[0], value_BGTE[0])
    kind = query_BHTD.device.type
    if torch.is_autocast_enabled(kind):
        # PyTorch's own attention would do the same.
        dtype = torch.get_autocast_dtype(kind)
        heads = (heads[0].to(dtype), heads[1].to(dtype), heads[2].to(dtype))
    shape = _shape(heads, borders, asked)
    attend = chosen.get(shape, attend_text_by_text)
    attended_THE = attend(*heads, borders, scale=shape.scale, softcap=shape.softcap, sinks_H=asked.get("s_aux"))
    return attended_THE[None]


def _shape(heads: tuple[torch.Tensor, ...], borders: Borders, asked: dict[str, Any]) -> Shape:
    query_HTD, key_GTD, value_GTE = heads
    scale = asked.get("scaling")
    return Shape(
        heads=query_HTD.shape[0],
        key_heads=key_GTD.shape[0],
        key_size=query_HTD.shape[2],
        value_size=value_GTE.shape[2],
        dtype=query_HTD.dtype,
        scale=float(query_HTD.shape[2] ** -0.5 if scale is None else scale),
        softcap=asked.get("softcap"),
        has_sinks=asked.get("s_aux") is not None,
        has_window=borders.window is not None,
    )


def _compare(
    observed: Observed,
    own: Callable[..., Any],
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    borders: Borders,
    asked: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the model's own attention over the dense mask, and notes how far ours is from it in float32."""
    dense = borders.dense()
    shape = _shape((heads[0][0], heads[1][0], heads[2][0]), borders, asked)
    with torch.autocast(heads[0].device.type, enabled=False):
        exact = [head.float() for head in heads]
        floating = dense is not None and dense.is_floating_point()
        wanted = own(*exact, dense.float() if floating and dense is not None else dense, **asked)[0]
        found = attend_text_by_text(
            exact[0][0], exact[1][0], exact[2][0], borders,
            scale=shape.scale, softcap=shape.softcap, sinks_H=asked.get("s_aux"),
        )[None]  # fmt: skip
    observed.differences.append(distance(found, wanted))
    observed.shapes.add(shape)
    result: tuple[torch.Tensor, torch.Tensor | None] = own(*heads, dense, **asked)
    return result
