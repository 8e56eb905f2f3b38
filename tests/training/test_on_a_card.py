"""What only a card shows: memory that really runs out, CUDA's kernels beside plain arithmetic, adapters reloaded."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.tiny_models import ARCHITECTURES, make_model, write_conversations
from tests.training.conftest import CARD_MARKS, RecordedEvents, SpecOf, train
from tests.training.process.child import start
from training.base.architecture import architecture_of
from training.base.load import load_base_model
from training.data.chat_template import ChatTemplate
from training.data.corpus import gather
from training.data.tokenizer import load_tokenizer
from training.files.model_folder import open_model_folder
from training.loop.loss import AnswerLoss
from training.preflight.kernel_proof import fault_of_grouped_products, fault_of_linear_attention
from training.spec import JobSpec

pytestmark = [*CARD_MARKS, pytest.mark.timeout(300)]

# Operands of bfloat16 and a product in float32 end within 1e-3 to 1e-2 of the same product in float64.
_ROUNDING = 2e-2


@pytest.fixture
def device() -> str:
    return "cuda"


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_family_learns_and_its_adapter_reloads_on_the_card(architecture: str, spec_of: SpecOf) -> None:
    spec = spec_of(architecture, num_epochs=2)
    steps = train(spec).all("progress")
    assert steps[-1].loss < steps[0].loss
    bare, adapted = _losses_of_the_answers(spec)
    assert adapted < bare


def _losses_of_the_answers(spec: JobSpec) -> tuple[float, float]:
    """Returns the loss of the base model alone, and with the stored adapter opened by plain PEFT."""
    folder = open_model_folder(spec.model_path, spec.base_model)
    template = ChatTemplate(load_tokenizer(folder))
    reads = architecture_of(folder, spec.base_model).context_length
    corpus = gather(spec.dataset_path, None, spec.hyperparameters, template, reads)
    model = load_base_model(spec, folder, RecordedEvents())

    def mean(loss: AnswerLoss) -> float:
        total = count = 0.0
        for example in corpus.train[:8]:
            inputs = {"input_ids": [example.input_ids], "labels": [example.labels]}
            with torch.no_grad():
                summed, number = loss({key: torch.tensor(value, device="cuda") for key, value in inputs.items()})
            total, count = total + summed.item(), count + number
        return total / count

    bare = mean(AnswerLoss(model))
    adapted = PeftModel.from_pretrained(model, str(spec.output_dir)).eval()
    return bare, mean(AnswerLoss(adapted.get_base_model()))


def test_memory_that_runs_out_is_recovered_and_changes_no_loss(spec_of: SpecOf, tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "head_dim": 128, "num_hidden_layers": 8}
    folder = make_model(tmp_path / "wide", "qwen3", intermediate_size=4096, vocab_size=32768, **shape)
    data = write_conversations(tmp_path / "long.jsonl", 64, exchanges=40)
    chosen: dict[str, Any] = {
        "model_path": folder, "dataset_path": data, "batch_size": 32, "validation_fraction": 0.0,
        "learning_rate": 1e-4, "lora_dropout": 0.0, "packing": False,
    }  # fmt: skip
    free = train(spec_of(name="free", **chosen))
    peak = torch.cuda.max_memory_allocated()
    with _memory_of_the_card(0.6 * peak):
        tight = train(spec_of(name="tight", **chosen))
    assert {"out_of_memory_recovered", "micro_batch_fitted"} & {notice.code for notice in tight.all("notice")}
    assert all(
        math.isclose(ours.loss, theirs.loss, rel_tol=_ROUNDING)
        for ours, theirs in zip(tight.all("progress"), free.all("progress"), strict=True)
    )


@contextmanager
def _memory_of_the_card(limit: float) -> Iterator[None]:
    """`limit`: bytes that this process may allocate."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_kernels_of_this_card_pass_the_proof_that_a_job_begins_with() -> None:
    assert fault_of_linear_attention("cuda") is None
    assert fault_of_grouped_products("cuda") is None


@pytest.mark.skipif(find_spec("fla") is None, reason="needs flash-linear-attention (pip install fla-core)")
@pytest.mark.parametrize(
    ("tokens", "borders"), [(256, (0, 256)), (1000, (0, 1000)), (1000, (0, 300, 301, 1000))], ids=["short", "long", "3"]
)
def test_the_gated_delta_rule_of_the_kernels_is_that_of_plain_arithmetic(tokens: int, borders: tuple[int, ...]) -> None:
    """Qwen3-Next's heads: 16 for queries and keys, 32 for values, of size 128. Texts end to end keep apart."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from transformers.models.qwen3_next import modeling_qwen3_next

    plain: Any = modeling_qwen3_next.torch_chunk_gated_delta_rule
    # transformers wraps it in a choice of kernels.
    while hasattr(plain, "__wrapped__"):
        plain = plain.__wrapped__
    torch.manual_seed(0)
    made: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    query, key = (torch.randn(1, tokens, 16, 128, **made) for _ in range(2))
    value, beta = torch.randn(1, tokens, 32, 128, **made), torch.rand(1, tokens, 32, **made)
    decay = -torch.rand(1, tokens, 32, device="cuda").mul(3).exp() * 0.1
    ours = [tensor.clone().requires_grad_(True) for tensor in (query, key, value, decay, beta)]
    theirs = [tensor.float().clone().requires_grad_(True) for tensor in (query, key, value, decay, beta)]
    ends = torch.tensor(borders, device="cuda", dtype=torch.int32) if len(borders) > 2 else None
    found, _ = chunk_gated_delta_rule(
        *ours[:3], g=ours[3], beta=ours[4], use_qk_l2norm_in_kernel=True, cu_seqlens=ends
    )  # fmt: skip
    texts = []
    for begin, end in itertools.pairwise(borders):
        q, k, v, g, b = (tensor[:, begin:end] for tensor in theirs)
        texts.append(plain(q, k, v, g=g, beta=b, use_qk_l2norm_in_kernel=True)[0])
    wanted = torch.cat(texts, dim=1)
    assert _relative(found, wanted) < _ROUNDING
    gradient = torch.randn_like(value)
    found.backward(gradient)
    wanted.backward(gradient.float())
    errors = {name: _relative(a.grad, b.grad) for name, a, b in zip("qkvgb", ours, theirs, strict=True)}  # type: ignore[arg-type]
    assert max(errors.values()) < _ROUNDING, errors


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL refuses two ranks on one")
def test_two_cards_make_the_steps_of_one(spec_of: SpecOf) -> None:
    chosen = {"batch_size": 7, "num_epochs": 2, "lora_dropout": 0.0}
    alone = train(spec_of(name="alone", **chosen)).all("progress")
    with start(spec_of(name="together", num_gpus=2, **chosen)) as child:
        assert child.exit_status() == 0
    together = [event for event in child.events if event.kind == "progress"]
    assert [event.step for event in together] == [event.step for event in alone]
    assert all(
        math.isclose(ours.loss, theirs.loss, rel_tol=_ROUNDING) for ours, theirs in zip(together, alone, strict=True)
    )
