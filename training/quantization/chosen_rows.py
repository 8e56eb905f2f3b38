"""Brings the tokens' rows to their experts and adds up, by weight, what comes back.

With plain operations of torch, as on a CPU, or with one kernel each way (training.quantization.fused_rows). Both are
deterministic: nothing is added by atomic operations.
"""

from __future__ import annotations

from typing import Any

import torch


class Routing:
    """Which experts each token chose, sorted by expert: row s belongs to token order_S[s] // K."""

    def __init__(self, chosen_NK: torch.Tensor) -> None:
        self.tokens, self.k = chosen_NK.shape
        self.expert_S, self.order_S = torch.sort(chosen_NK.reshape(-1))
        # Where the row of a token's k-th expert is.
        self.back_S = torch.empty_like(self.order_S)
        self.back_S[self.order_S] = torch.arange(self.order_S.numel(), device=self.order_S.device)

    @property
    def back_NK(self) -> torch.Tensor:
        return self.back_S.view(self.tokens, self.k)


def to_experts(hidden_ND: torch.Tensor, routing: Routing, *, is_fused: bool) -> torch.Tensor:
    """Returns a row for each of a token's experts, sorted by expert."""
    if not is_fused:
        return hidden_ND[routing.order_S // routing.k]
    rows: torch.Tensor = _ToExperts.apply(hidden_ND, routing)  # type: ignore[no-untyped-call]
    return rows


def from_experts(out_SD: torch.Tensor, weight_NK: torch.Tensor, routing: Routing, *, is_fused: bool) -> torch.Tensor:
    """Returns the weighted sum of each token's rows."""
    if is_fused:
        total: torch.Tensor = _FromExperts.apply(out_SD, weight_NK, routing)  # type: ignore[no-untyped-call]
        return total
    out_SD = out_SD * weight_NK.reshape(-1)[routing.order_S].unsqueeze(-1)
    # Reshape and sum, not index_add_: that is not deterministic on a GPU.
    return out_SD[routing.back_S].view(routing.tokens, routing.k, -1).sum(dim=1)


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, routing: Routing) -> torch.Tensor:
        from training.quantization.fused_rows import spread_rows

        # Saved, and not kept on ctx: where activations are recomputed, what forward saves is let go.
        ctx.save_for_backward(routing.back_NK)
        return spread_rows(hidden_ND, routing.back_NK)

    @staticmethod
    def backward(ctx: Any, grad_SD: torch.Tensor) -> tuple[torch.Tensor, None]:
        from training.quantization.fused_rows import sum_rows

        return sum_rows(grad_SD, *ctx.saved_tensors), None


class _FromExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_SD: torch.Tensor, weight_NK: torch.Tensor, routing: Routing) -> torch.Tensor:
        from training.quantization.fused_rows import sum_rows

        ctx.save_for_backward(out_SD, routing.back_NK, weight_NK)
        return sum_rows(out_SD, routing.back_NK, weight_NK)

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        from training.quantization.fused_rows import weighted_rows_backward

        return *weighted_rows_backward(grad_ND, *ctx.saved_tensors), None
