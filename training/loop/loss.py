"""Cross entropy of only the answers' tokens, in slices, so that the logits of a whole batch never exist.

The head is frozen, so the gradient for the hidden states is known as soon as a slice's logits are: it is computed
in the forward pass, the logits are freed, and backward only scales it. Each trained token costs one multiplication
with the vocabulary forward and one backward; prompt and padding tokens cost none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from training.data.example import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# 1024 tokens by 152k words in float32 are 0.6 GiB, twice that while the gradient is computed.
SLICE_TOKENS = 1024


class AnswerLoss:
    """Summed loss of a batch, and the number of tokens in the sum. Holds no state but the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        config = model.config.get_text_config()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._scale = _logit_scale(config)
        self._head_is_plain = self._agrees_with_the_model()

    def __call__(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
        """inputs: the collator's, with labels. Returns (sum of losses, trained tokens)."""
        labels_BT = inputs["labels"]
        rest = {key: value for key, value in inputs.items() if key != "labels"}
        targets_BT = functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
        trained_BT = targets_BT != IGNORED
        targets_N = targets_BT[trained_BT]
        if not self._head_is_plain:
            logits_NV = self._model(**rest, use_cache=False).logits[trained_BT]
            return functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum"), targets_N.numel()
        hidden_BTD = self._model.base_model(**rest, use_cache=False).last_hidden_state
        total: torch.Tensor = _SlicedCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden_BTD[trained_BT], targets_N, self._logits
        )
        return total, targets_N.numel()

    def _logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        head = self._model.get_output_embeddings()
        logits_NV: torch.Tensor = head(hidden_ND.to(head.weight.dtype)).float() * self._scale
        if self._softcap is not None:
            logits_NV = self._softcap * torch.tanh(logits_NV / self._softcap)
        return logits_NV

    def _agrees_with_the_model(self) -> bool:
        """Compares with the model's own logits once: an architecture may change them in a way that we do not know."""
        if self._model.get_output_embeddings() is None:
            return False
        device = self._model.get_input_embeddings().weight.device
        ids_BT = torch.arange(8, device=device)[None]
        was_training = self._model.training
        self._model.eval()
        with torch.no_grad():
            theirs = self._model(input_ids=ids_BT, use_cache=False).logits.float()
            ours = self._logits(self._model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state)
        self._model.train(was_training)
        return bool(torch.allclose(theirs, ours, rtol=1e-2, atol=1e-2))


class _SlicedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, targets_N: torch.Tensor, logits: Any) -> torch.Tensor:
        total = torch.zeros((), device=hidden_ND.device, dtype=torch.float32)
        gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden_ND.shape[0], SLICE_TOKENS):
            part = slice(start, start + SLICE_TOKENS)
            with torch.set_grad_enabled(gradient_ND is not None):
                slice_ND = hidden_ND[part].detach().requires_grad_(gradient_ND is not None)
                loss = functional.cross_entropy(logits(slice_ND), targets_N[part], reduction="sum")
                if gradient_ND is not None:
                    (gradient_ND[part],) = torch.autograd.grad(loss, slice_ND)
            total += loss.detach()
        if gradient_ND is not None:
            ctx.save_for_backward(gradient_ND)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_ND,) = ctx.saved_tensors
        return gradient_ND * grad_total.to(gradient_ND.dtype), None, None


def _logit_scale(config: Any) -> float:
    """Returns the factors by which some architectures multiply logits (Cohere, Falcon-H1) or divide them (Granite)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 if divisor is None else 1.0 / float(divisor)
