"""Tests whether a model keeps conversations apart that lie end to end in one row, by running it."""

from __future__ import annotations

from typing import Any

import torch

from training.data.micro_batches import pack
from training.distance import distance
from training.quantization.experts import has_fused_experts

# Seen: 1.6 % with SmolLM2-135M in bfloat16, whose logits are off by up to 0.5 each; 3e-7 in float32.
_MOST_ROUNDING = 0.05


# Seen: 1e-7 in float32.
_MOST_MOVEMENT_OF_EXPERTS = 0.01


def packs_without_leaks(model: Any) -> bool:
    """Returns True if the model gives two texts laid end to end the same logits as each text alone."""
    return why_not_packed(model) is None


def why_not_packed(model: Any) -> str | None:
    """Describes how this model mixes texts that lie end to end; None if it keeps them apart.

    The model itself is tested, because a list of names cannot tell: attention honours position_ids, while linear
    attention and its convolutions carry a state across texts unless their kernels know the borders. There are two
    tests, since a model that computes in bfloat16 never gives the same numbers for another layout: the second text
    must not change with the first one, and both must be what they are apart, up to rounding.
    """
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().num_embeddings
    first, other, second = (
        torch.arange(start, start + length, device=device) % vocabulary for start, length in ((1, 7), (101, 7), (9, 5))
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            apart = torch.cat([_logits(model, input_ids=text[None]) for text in (first, second)], dim=1)
            together = _logits(model, **pack([first, second]))
            beside_other = _logits(model, **pack([other, second]))
    except (ValueError, TypeError, NotImplementedError) as error:
        # Some architectures refuse it themselves: without their kernels, or always.
        return str(error).strip().partition("\n")[0][:300] or type(error).__name__
    finally:
        model.train(was_training)
    moved = distance(together[:, len(first) :], beside_other[:, len(first) :])
    if not moved <= _most_movement(model):
        return f"it would carry one conversation into the next: another one before it moves its logits by {moved:.1%}"
    differing = distance(together, apart)
    if not differing <= _MOST_ROUNDING:
        return (
            f"it reads conversations that lie end to end otherwise than apart: their logits differ by {differing:.1%}"
        )
    return None


def _most_movement(model: Any) -> float:
    """Returns how far a text may change when only the one before it changes: not at all, unless something leaks.

    Experts are the exception: they multiply the rows of all texts together, and a product of other rows may round
    differently. A leak changes the logits by as much as their own size.
    """
    return _MOST_MOVEMENT_OF_EXPERTS if any(has_fused_experts(module) for module in model.modules()) else 0.0


def _logits(model: Any, **inputs: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**inputs, use_cache=False).logits.float()
    return logits
