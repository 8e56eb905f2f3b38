"""Training, evaluation and samples compute in the same types: nowhere does autocast change them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import training.recipe
from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD_TOO, SpecOf, train
from training.compute import ComputeType
from training.loop.trainer import AdapterTrainer

# No other size in the tiny models is three: what has it is the adapter.
_RANK = 3


class _Products(TorchDispatchMode):
    """Notes the operands' types of every product of two matrices, forward and backward, by what the trainer does."""

    def __init__(self) -> None:
        super().__init__()
        self.doing = "other"
        self.types: dict[tuple[str, str], set[torch.dtype]] = defaultdict(set)

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().partition(".")[0] in ("aten::mm", "aten::addmm", "aten::addmm_"):
            operands = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            whose = "adapter" if any(_RANK in operand.shape for operand in operands) else "frozen"
            self.types[self.doing, whose] |= {operand.dtype for operand in operands}
        return function(*args, **(kwargs or {}))

    def within(self, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            before, self.doing = self.doing, name
            try:
                return original(*arguments, **options)
            finally:
                self.doing = before

        monkeypatch.setattr(owner, name, noted)


@ON_A_CARD_TOO
@IN_BOTH_TYPES
def test_training_evaluation_and_samples_multiply_in_the_same_types(
    compute_type: ComputeType, device: str, spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = _Products()
    products.within(AdapterTrainer, "training_step", monkeypatch)
    products.within(AdapterTrainer, "evaluate", monkeypatch)
    products.within(training.recipe, "answer", monkeypatch)
    with products:
        train(spec_of(device=device, lora_rank=_RANK, num_epochs=1, sample_prompts=("What colour is the cat?",)))
    wanted = getattr(torch, compute_type)
    for doing in ("training_step", "evaluate", "answer"):
        assert products.types[doing, "frozen"] <= {wanted}, doing
        # Its weights are float32, and are multiplied in the type of the activations.
        assert products.types[doing, "adapter"] == {wanted}, doing
    # The head, at least, is no 4-bit product of a library.
    assert products.types["training_step", "frozen"] == {wanted}
