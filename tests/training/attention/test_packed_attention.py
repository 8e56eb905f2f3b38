"""Packed rows by borders: equal to a dense mask in each family, proven by running the model, else not used."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers

from tests.training.attention.flash_on_cpu import flash_on_cpu
from tests.training.conftest import IN_BOTH_TYPES, ON_A_CARD, ON_A_CARD_TOO, ROUNDING, RecordedEvents, SpecOf
from training.attention import choice
from training.attention.borders import borders_on, read_borders
from training.attention.choice import borders_of_lengths, choose_packed_attention, fault_of
from training.attention.registered import NAMES, Shape, attends_by_borders, chosen
from training.attention.text_by_text import attend_text_by_text
from training.attention.varlen import attend_varlen
from training.base.dtype import compute_dtype
from training.base.sequence_packing import why_not_packed
from training.compute import ComputeType
from training.data.micro_batches import pack
from training.recipe import may_pack

_TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
    # Attention of random weights is nearly even; larger ones tell positions apart.
    "initializer_range": 0.2,
}
_ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
# What each has beside grouped heads. Windows are shorter than the texts below.
_FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 32},
    "Qwen3Moe": {"head_dim": 32, "num_experts": 4, **_ROUTED},
    "Llama": {},
    # A window in every layer.
    "Mistral": {"sliding_window": 5},
    # A window in some layers, a scale of its own; Gemma-2 with a soft cap, loaded with its attention written out.
    "Gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 64},
    "Gemma3": {"head_dim": 16, "sliding_window": 5, "num_hidden_layers": 6, "query_pre_attn_scalar": 64},
    # Heads of keys and of values differ in size.
    "DeepseekV3": {**_ROUTED, **_LATENT},
    # Sinks and windows, written out; transformers' mask does not know where packed texts begin.
    "GptOss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    # Layers with windows but without positions.
    "Cohere2": {"sliding_window": 5, "num_hidden_layers": 4},
}


def make(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    kind = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    settings = kind(**{**_TINY, **_FAMILIES.get(family, {}), **config})
    return getattr(transformers, f"{family}ForCausalLM")(settings).to(dtype).eval().requires_grad_(False)


def _read(model: Any, lengths: tuple[int, ...], first: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a packed row's hidden states and the gradient of its embeddings."""
    # The same texts but for the first token.
    ids = [torch.arange(length) * 7 % 120 + 1 for length in lengths]
    ids[0][0] = first
    device = model.get_input_embeddings().weight.device
    row = pack([text.to(device) for text in ids])
    embeddings = model.get_input_embeddings()(row.pop("input_ids")).detach().requires_grad_()
    hidden = model.base_model(inputs_embeds=embeddings, use_cache=False, **row).last_hidden_state
    generator = torch.Generator().manual_seed(0)
    (gradient,) = torch.autograd.grad(
        hidden, embeddings, torch.randn(hidden.shape, generator=generator).to(hidden.dtype)
    )
    return hidden.detach(), gradient


def _apart(model: Any, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as `_read`, of one text after the other."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn((1, sum(lengths), _TINY["hidden_size"]), generator=generator)
    results = []
    for length, part in zip(lengths, gradient.split(lengths, dim=1), strict=True):
        ids = torch.arange(length) * 7 % 120 + 1
        ids[0] = 1 if not results else ids[0]
        embeddings = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
        hidden = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        results.append((hidden.detach(), *torch.autograd.grad(hidden, embeddings, part.to(hidden))))
    return torch.cat([hidden for hidden, _ in results], dim=1), torch.cat([by for _, by in results], dim=1)


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).float().norm() / wanted.float().norm())


@pytest.mark.parametrize("family", _FAMILIES)
@IN_BOTH_TYPES
def test_a_family_reads_packed_rows_as_with_a_dense_mask(family: str, compute_type: ComputeType) -> None:
    lengths = (9, 1, 14)
    model = make(family, compute_dtype("cpu", compute_type))
    config = model.config.to_dict()
    dense = _read(model, lengths) if family != "GptOss" else _apart(model, lengths)
    made = choose_packed_attention(model, lengths)
    assert made.dense_because is None and attends_by_borders(model) and not made.dropped
    # Windows were shortened for the proof only.
    assert model.config.to_dict() == config
    ours = _read(model, lengths)
    # In bfloat16 two layouts differ by roundings that layers enlarge, and a router may choose another expert: both are
    # compared with float32.
    routes = any(word in family for word in ("Moe", "V3", "Oss"))
    read = _read if family != "GptOss" else _apart
    exact = dense if compute_type == "float32" else read(make(family, torch.bfloat16).float(), lengths)
    for found, wanted, right in zip(ours, dense, exact, strict=True):
        most = ROUNDING["float32"] if compute_type == "float32" else max(2 * _distance(wanted, right), 0.2 * routes)
        assert _distance(found, right) <= most
    # The second and third text know nothing of the first.
    other = _read(model, lengths, first=77)
    if not routes:
        assert torch.equal(other[0][:, 9:], ours[0][:, 9:]) and torch.equal(other[1][:, 9:], ours[1][:, 9:])
    assert not torch.equal(other[0][:, :9], ours[0][:, :9])
    assert why_not_packed(model) is None


def test_rows_of_one_text_and_padded_rows_are_left_to_the_models_own_attention() -> None:
    model = make("Mistral")
    ids = torch.arange(24).reshape(2, 12) + 1
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        own = [model(input_ids=ids[:1]).logits, model(input_ids=ids, attention_mask=mask).logits]
        assert choose_packed_attention(model, ()).dense_because is None
        ours = [model(input_ids=ids[:1]).logits, model(input_ids=ids, attention_mask=mask).logits]
    assert all(torch.equal(found, wanted) for found, wanted in zip(ours, own, strict=True))
    generated = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(generated, model.generate(ids[:, :5], max_new_tokens=4, do_sample=False))


def test_training_recomputes_a_layer_with_the_same_borders() -> None:
    model = make("Gemma3")
    assert choose_packed_attention(model, ()).dense_because is None
    plain = _read(model, (9, 14))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    for found, wanted in zip(_read(model, (9, 14)), plain, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        # Sparse attention, chosen by an indexer from the mask's values.
        ("DeepseekV32", {**_ROUTED, **_LATENT}, "must match the size"),
        # A bias by distance, in attention of its own.
        ("Bloom", {"n_layer": 2, "n_head": 4}, "cannot be replaced"),
        # No attention at all.
        ("Mamba", {"state_size": 8}, "where texts begin"),
    ],
)
def test_a_model_that_asks_for_more_keeps_its_dense_mask(family: str, config: dict[str, Any], reason: str) -> None:
    model = make(family, **config)
    before, original = _read_plain(model), model.config._attn_implementation
    made = choose_packed_attention(model, ())
    assert made.dense_because is not None and reason in made.dense_because
    assert not attends_by_borders(model) and model.config._attn_implementation == original
    assert torch.equal(_read_plain(model), before)


def _read_plain(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(1, 9)[None], use_cache=False).logits
    return logits


def test_a_layer_that_computes_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if our attention forgot an architecture's scale: the layer's own attention says otherwise."""

    def without_scale(*heads: Any, scale: float, **asked: Any) -> torch.Tensor:
        return attend_text_by_text(*heads, scale=scale * 1.1, **asked)

    monkeypatch.setattr("training.attention.registered.attend_text_by_text", without_scale)
    made = choose_packed_attention(make("Llama"), ())
    assert made.dense_because is not None and "differs" in made.dense_because


def test_a_layer_that_asks_for_what_we_do_not_know_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("Llama")
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *given, **asked: forward(*given, temperature=torch.ones(4), **asked))
    made = choose_packed_attention(model, ())
    assert made.dense_because == "its layers ask their attention for temperature"


def _sees(begins: list[int], length: int, window: int | None = None) -> Any:
    text_T = torch.tensor([sum(begin <= place for begin in begins) for place in range(length)])

    def sees(_batch: Any, _head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        near = key <= query if window is None else (key <= query) & (key > query - window)
        return near & (text_T[query] == text_T[key])

    return sees


def test_borders_are_what_the_mask_means() -> None:
    for begins, window in (([0], None), ([0, 3, 4, 11], None), ([0, 3, 4, 11], 3), ([0, 6], 1)):
        borders = read_borders(_sees(begins, 20, window), 20, window, "cpu", lambda: None)
        assert borders is not None
        if window != 1:
            assert borders.ends == (*begins, 20) and borders.ends_on_device.tolist() == list(borders.ends)
            assert borders.window == window and borders.longest == max(b - a for a, b in pairwise(borders.ends))
        assert borders_on(borders.as_mask()) is borders and borders_on(torch.ones(1)) is None
    # A window as long as the longest text is none.
    borders = read_borders(_sees([0, 12], 20, 12), 20, 12, "cpu", lambda: None)
    assert borders is not None and borders.window is None
    # Chunks of a text are texts.
    chunks = read_borders(lambda _b, _h, q, k: (k <= q) & (q // 4 == k // 4), 10, 4, "cpu", lambda: None)
    assert chunks is not None and chunks.ends == (0, 4, 8, 10)


@pytest.mark.parametrize(
    "more",
    [
        # A prefix that is read in both directions; every second token; a window that nobody named; a place seen by all.
        lambda q, k: (k <= q) | (k < 5),
        lambda q, k: (k <= q) & (((q - k) % 2 == 0) | (q - k == 1)),
        lambda q, k: (k <= q) & (k > q - 7),
        lambda q, k: (k <= q) & ((q // 8 == k // 8) | (k == 0)),
        lambda q, k: torch.ones_like(q == k),
    ],
)
def test_a_mask_that_means_more_than_borders_has_none(more: Any) -> None:
    assert read_borders(lambda _b, _h, q, k: more(q, k), 64, None, "cpu", lambda: None) is None


_SHAPES = [
    Shape(4, 4, 64, 64, torch.bfloat16, 0.125, None, has_sinks=False, has_window=False),
    Shape(8, 2, 128, 128, torch.bfloat16, 128**-0.5, None, has_sinks=False, has_window=True),
    Shape(16, 2, 256, 256, torch.bfloat16, 0.0625, None, has_sinks=False, has_window=False),
    # Multi-head latent attention; a size that is no multiple of eight; sinks, with and without a window.
    Shape(4, 4, 192, 128, torch.bfloat16, 192**-0.5, None, has_sinks=False, has_window=False),
    Shape(4, 2, 20, 20, torch.bfloat16, 0.3, None, has_sinks=False, has_window=True),
    Shape(8, 1, 64, 64, torch.bfloat16, 0.125, None, has_sinks=True, has_window=True),
    Shape(8, 8, 64, 64, torch.bfloat16, 0.125, None, has_sinks=True, has_window=False),
]


@pytest.mark.parametrize("shape", _SHAPES, ids=lambda shape: f"{shape.heads}x{shape.key_size}")
@ON_A_CARD_TOO
def test_the_kernel_for_all_texts_at_once_agrees_with_one_after_the_other(shape: Shape, device: str) -> None:
    if device == "cuda":
        assert fault_of(attend_varlen, shape, torch.device("cuda")) is None
        return
    with flash_on_cpu() as called:
        assert fault_of(attend_varlen, shape, torch.device("cpu")) is None
    assert called == ["forward", "backward"]


def test_a_kernel_that_is_wrong_missing_or_asked_for_too_much_is_not_used() -> None:
    plain, device = _SHAPES[0], torch.device("cpu")
    missing = fault_of(attend_varlen, plain, device)
    assert missing is not None and "_flash_attention_forward" in missing

    def without_borders(*given: Any, **asked: Any) -> torch.Tensor:
        *heads, borders = given
        return attend_text_by_text(*heads, borders_of_lengths((borders.ends[-1],), None, device), **asked)

    wrong = fault_of(without_borders, plain, device)
    assert wrong is not None and "its result differs by" in wrong
    for shape, reason in (
        (Shape(2, 2, 64, 64, torch.bfloat16, 0.1, 50.0, has_sinks=False, has_window=False), "soft cap"),
        (Shape(2, 2, 512, 512, torch.bfloat16, 0.1, None, has_sinks=False, has_window=False), "at most 256"),
        (Shape(2, 2, 64, 64, torch.float32, 0.1, None, has_sinks=False, has_window=False), "16 bits"),
    ):
        assert reason in str(fault_of(attend_varlen, shape, device))


@pytest.fixture
def _kernel_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(choice.KERNELS, "cpu", attend_varlen)
    yield
    chosen.clear()


@pytest.mark.usefixtures("_kernel_for_a_cpu")
def test_a_kernel_that_proves_itself_and_is_quicker_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (9, 1, 14)
    dense = _read(make("Gemma3", torch.bfloat16), lengths)
    exact = _read(make("Gemma3", torch.bfloat16).float(), lengths)
    model = make("Gemma3", torch.bfloat16)
    # Operators written in Python are slow; which is quicker is decided by these.
    seconds = {attend_varlen: 1.0, attend_text_by_text: 2.0}
    monkeypatch.setattr(choice, "_seconds", lambda attend, *_rest: seconds[attend])
    with flash_on_cpu() as called:
        assert choose_packed_attention(model, lengths) == choice.Choice(None)
        # With a window and without.
        assert set(chosen.values()) == {attend_varlen} and {shape.has_window for shape in chosen} == {True, False}
        called.clear()
        ours = _read(model, lengths)
        assert called.count("forward") == called.count("backward") == len(model.model.layers)
    for found, wanted, right in zip(ours, dense, exact, strict=True):
        assert _distance(found, right) <= 2 * _distance(wanted, right)
    seconds[attend_varlen] = 3.0
    with flash_on_cpu():
        slower = choose_packed_attention(model, lengths)
    assert slower.dense_because is None and len(slower.dropped) == 2 and not chosen
    assert "it takes 3000.00 ms where one text after the other takes 2000.00 ms" in slower.dropped[0]


@pytest.mark.usefixtures("_kernel_for_a_cpu")
def test_a_kernel_that_cannot_be_used_is_told_in_the_story(spec_of: SpecOf) -> None:
    spec = spec_of("qwen3")
    voice = RecordedEvents()
    model = make("Gemma3", torch.bfloat16)
    assert may_pack(spec, model, voice, [9, 14])
    notices = voice.all("notice")
    assert {notice.code for notice in notices} == {"kernel_dropped"}
    assert "heads of 16 numbers" in notices[0].message and "_flash_attention_forward" in notices[0].data["reason"]
    assert attends_by_borders(model) and why_not_packed(model) is None


def test_a_dense_mask_is_told_in_the_story(spec_of: SpecOf) -> None:
    voice = RecordedEvents()
    assert may_pack(spec_of("qwen3"), make("DeepseekV32", **_ROUTED, **_LATENT), voice)
    (notice,) = voice.all("notice")
    assert notice.code == "attention_dense" and "must match the size" in notice.data["reason"]


@pytest.mark.parametrize("lengths", [(), (5,), (8000, 700), (20000,)])
def test_kernels_are_timed_on_one_micro_batch_of_the_jobs_lengths(lengths: tuple[int, ...]) -> None:
    timed = choice._of_one_micro_batch(lengths)
    assert timed == {(): [512], (5,): [5], (8000, 700): [8000], (20000,): [8192]}[lengths]
    assert choice._seconds(attend_text_by_text, _SHAPES[1], torch.device("cpu"), (5, 7)) > 0


@ON_A_CARD
@pytest.mark.parametrize("family", ["Qwen3", "Mistral", "Gemma3", "DeepseekV3"])
def test_on_a_card_a_family_attends_by_the_kernel_and_reads_as_with_a_dense_mask(family: str) -> None:
    lengths = (9, 1, 14)
    exact = _read(make(family, torch.bfloat16).float(), lengths)
    model = make(family, torch.bfloat16).to("cuda")
    dense = _read(model, lengths)
    made = choose_packed_attention(model, [600, 900, 500, 1200])
    assert made.dense_because is None and chosen, made
    for found, wanted, right in zip(_read(model, lengths), dense, exact, strict=True):
        most = max(2 * _distance(wanted.cpu(), right), 0.2 * (family == "DeepseekV3"))
        assert _distance(found.cpu(), right) <= most
    assert why_not_packed(model) is None


def test_our_names_are_none_by_which_transformers_knows_its_own() -> None:
    for name in NAMES.values():
        assert not any(word in name for word in ("sdpa", "eager", "flash", "flex", "paged", "/"))
