"""The real Qwen3-Next-80B-A3B architecture with random 4-bit weights: build time, memory, tokens a second.

    python benchmarks/moe_80b.py --device cuda            all 48 layers, 512 experts, 2k to 16k tokens a micro-batch
    python benchmarks/moe_80b.py                          a dry run on a CPU: 2 layers, 32 experts, 64 to 256 tokens
    python benchmarks/moe_80b.py --device cuda --profile 8192    and the 25 dearest kernels of a step of that size

No weights are needed: the skeleton is made without memory and filled layer by layer with random NF4 bytes, as many as
the real model has. Time and memory do not depend on their values. Each size is a whole training by the trainer's own
path, `training.recipe.train_on`: what it decides (packing, kernels, how experts are multiplied) is decided here and
said. The dtype is the trainer's: bf16 on a GPU, float32 on a CPU without bf16 units, where a grouped product of bf16 is
sixty times slower (measured: 0.24 against 15 GFLOP/s on two cores without AVX512-BF16; a step did not end).
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from training.base.dtype import compute_dtype
from training.compute import compute_type
from training.data.chat_template import ChatTemplate
from training.data.corpus import Corpus
from training.data.example import IGNORED, Example
from training.data.plan import Plan
from training.event_writer import EventWriter
from training.events import AnyEvent
from training.failures import TrainingFailed, is_out_of_memory
from training.files.model_folder import ModelFolder
from training.files.module_names import UNQUANTISED_MODULES
from training.preflight.estimate import Estimate
from training.preflight.kernel_proof import fault_of_linear_attention
from training.quantization.experts import (
    EXPERTS_FUNCTION,
    Nf4Config,
    Nf4Quantizer,
    expert_states,
    has_fused_experts,
)
from training.recipe import Prepared, train_on
from training.spec import Hyperparameters, JobSpec
from training.stop_switch import StopSwitch

_GIB = 2**30
# Notices that differ with the size of a micro-batch.
_OF_EACH_SIZE = ("experts_product", "experts_product_left_out", "out_of_memory_recovered")
_USUAL: dict[str, dict[str, Any]] = {
    "cuda": {"layers": 48, "experts": 512, "tokens": [2048, 4096, 8192, 16384], "steps": 3},
    "cpu": {"layers": 2, "experts": 32, "tokens": [64, 128, 256], "steps": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, help="48 on a card, 2 on a CPU")
    parser.add_argument("--experts", type=int, help="512 on a card, 32 on a CPU")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens a micro-batch, one line of the table each")
    parser.add_argument("--conversations", type=int, default=1, help="of how many conversations those tokens are")
    parser.add_argument("--steps", type=int, help="timed steps a size, after one to warm up")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--profile", type=int, help="tokens of a step whose dearest kernels are listed at the end")
    parsed = vars(parser.parse_args())
    given = {key: value for key, value in parsed.items() if value is not None}
    arguments = argparse.Namespace(**{**parsed, **_USUAL[given["device"]], **given})
    began = time.perf_counter()
    model = build(arguments.layers, arguments.experts, arguments.device)
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{machine}; torch {torch.__version__}; {arguments.layers} layers × {arguments.experts} experts, "
        f"computed in {str(compute_dtype(arguments.device)).removeprefix('torch.')}"
    )
    print(f"built in {time.perf_counter() - began:.1f} s, {_memory(arguments.device):.2f} GiB in use", flush=True)
    if arguments.device == "cuda" and (fault := fault_of_linear_attention("cuda")) is not None:
        raise SystemExit(f"a job would be refused here: {fault}")
    with tempfile.TemporaryDirectory() as folder:
        for number, tokens in enumerate(arguments.tokens):
            clock = Stopwatch(arguments.device, tells=number == 0)
            try:
                train(model, tokens, arguments, Path(folder, str(tokens)), clock)
            except (TrainingFailed, RuntimeError) as error:
                if not (is_out_of_memory(error) or getattr(error, "code", None) == "out_of_memory"):
                    raise
                print(f"{tokens:>8} {'out of memory':>31}")
                break
            if number == 0:
                print(f"{'tokens':>8} {'s/step':>9} {'tokens/s':>10} {'peak GiB':>10}")
            seconds = clock.seconds_a_step
            print(f"{tokens:>8} {seconds:>9.2f} {tokens / seconds:>10.1f} {_peak(arguments.device):>10.2f}", flush=True)
            remove_adapter(model)
        if arguments.profile is not None:
            profiled = ProfiledStep(arguments.device)
            train(model, arguments.profile, arguments, Path(folder, "profile"), profiled)
            print(f"a step of {arguments.profile} tokens\n{profiled.dearest()}")


class Stopwatch(EventWriter):
    """Takes the times of a training's steps from its events. `tells`: prints what the trainer decides and says."""

    def __init__(self, device: str, *, tells: bool = False) -> None:
        super().__init__(-1, "benchmark")
        self.losses: list[float] = []
        self._device, self._tells = device, tells
        self._ends: list[float] = []

    def say(self, event: AnyEvent) -> None:
        if event.kind == "progress":
            _wait(self._device)
            self._ends.append(time.perf_counter())
            self.losses.append(event.loss)
            if self._device == "cuda" and len(self._ends) == 1:
                torch.cuda.reset_peak_memory_stats()
        elif event.kind == "notice" and (self._tells or event.code in _OF_EACH_SIZE):
            print(f"- {event.code}: {event.message}")
        elif event.kind == "adapter_attached" and self._tells:
            packing = "end to end" if event.packing else "side by side"
            print(f"trainable {event.trainable_parameters / 1e6:.1f} M; conversations {packing}", flush=True)

    @property
    def seconds_a_step(self) -> float:
        """Without the first step, which compiles and warms up."""
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)


class ProfiledStep(Stopwatch):
    """Profiles a training's second step: the first compiles and warms up."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        activities = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
        self._profile = profile(activities=activities)

    def say(self, event: AnyEvent) -> None:
        super().say(event)
        if event.kind == "progress" and event.step == 1:
            self._profile.start()
        elif event.kind == "progress" and event.step == 2:
            self._profile.stop()

    def dearest(self, count: int = 25) -> str:
        """Lists kernels by their time, on a CPU operations without what they call."""
        on_gpu = self._device == "cuda"
        spent = [
            (entry.self_device_time_total if on_gpu else entry.self_cpu_time_total, entry.count, entry.key)
            for entry in self._profile.key_averages()
        ]
        lines = [f"{us / 1000:10.2f} ms {times:7d} × {name[:100]}" for us, times, name in sorted(spent, reverse=True)]
        whole = f"{sum(us for us, _, _ in spent) / 1000:10.2f} ms {sum(times for _, times, _ in spent):7d} × together"
        return "\n".join([whole, *lines[:count]])


def train(model: Any, tokens: int, arguments: argparse.Namespace, folder: Path, clock: Stopwatch) -> None:
    """Trains an adapter on micro-batches of this many tokens, half of them answers, one micro-batch a step."""
    count, steps = arguments.conversations, arguments.steps + 1
    length = tokens // count
    torch.manual_seed(0)
    examples = []
    for number in range(count * steps):
        ids = torch.randint(10, min(50_000, model.config.vocab_size), (length,)).tolist()
        labels = [IGNORED] * (length // 2) + ids[length // 2 :]
        examples.append(Example(ids, labels, f"line {number + 1}"))
    corpus = Corpus(tuple(examples), (), (), max_length=length, format="random", remarks=())
    spec = JobSpec(
        job_id="benchmark",
        base_model="random",
        model_path=folder,
        dataset_path=folder / "none",
        work_dir=folder / "work",
        checkpoint_dir=folder / "checkpoints",
        output_dir=folder / "adapter",
        hyperparameters=Hyperparameters(
            lora_rank=arguments.rank, batch_size=count, num_epochs=1, validation_fraction=0.0, sample_prompts=()
        ),
        device=arguments.device,
        checkpoint_seconds=86_400,
        trackers=(),
    )
    spec.work_dir.mkdir(parents=True)
    plan = Plan(
        batch_size=count,
        ranks=1,
        micro_batch_tokens=tokens,
        steps_per_epoch=steps,
        epochs=1,
        warmup_steps=0,
        compute_type=compute_type(arguments.device),
    )
    # Only a CPU host asks how much the run will need: it keeps weights unpacked in what is left.
    estimate = Estimate(0, 0, 0, 0, 0, memory_bytes=0, disk_bytes=0, seconds=0.0, cost=None)
    tokenizer = _tokenizer()
    prepared = Prepared(
        ModelFolder(folder, {}, ()), tokenizer, ChatTemplate(tokenizer), corpus, plan, estimate, is_cut=False
    )
    train_on(model, prepared, spec, clock, StopSwitch())


def _tokenizer() -> Any:
    """Names no real token: the conversations are tokens already."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<end>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def remove_adapter(model: Any) -> None:
    """Puts the frozen layers back in the places of the adapted ones."""
    for path, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(path, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(False)


def build(layers: int, experts: int, device: str, **shape: Any) -> Any:
    """Returns the model with random 4-bit weights on the device, frozen; no expert is ever in 16 bits.

    `shape`: other sizes than the real model's, for a rehearsal.
    """
    chosen = {"num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": min(10, experts)}
    config = Qwen3NextConfig(**(chosen | {"pad_token_id": 0} | shape))
    config.use_cache = False
    dtype = compute_dtype(device)
    settings = Nf4Config(dtype, list(UNQUANTISED_MODULES))
    with torch.device("meta"):
        model = Qwen3NextForCausalLM._from_config(config, dtype=dtype, experts_implementation=EXPERTS_FUNCTION)
    replace_with_bnb_linear(model, modules_to_not_convert=list(UNQUANTISED_MODULES), quantization_config=settings)
    for path, module in list(model.named_modules()):
        _fill(model, path, module, device)
    model.is_quantized = True
    model.hf_quantizer = Nf4Quantizer(settings, pre_quantized=False)
    model.hf_quantizer.postprocess_model(model)
    return model.requires_grad_(False)


def _fill(model: Any, path: str, module: Any, device: str) -> None:
    if isinstance(module, bnb.nn.Linear4bit):
        packed, state = _random_nf4(torch.Size((module.out_features, module.in_features)), device)
        module.weight = bnb.nn.Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=64, compress_statistics=True, quant_type="nf4",
            bnb_quantized=True, module=module,
        )  # fmt: skip
        module.quant_state = state
        module.support_avx512bf16_for_cpu = False
    elif has_fused_experts(module):
        for name in ("gate_up_proj", "down_proj"):
            packed, state = _random_nf4(module._parameters[name].shape, device)
            expert_states(module)[name] = state
            module._parameters[name] = torch.nn.Parameter(packed, requires_grad=False)
    elif type(module).__name__.endswith("RotaryEmbedding"):
        model.set_submodule(path, type(module)(config=model.config).to(device))
    else:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=compute_dtype(device), device=device)
                _initialise(value, path, name, type(module).__name__)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


def _initialise(value: torch.Tensor, path: str, name: str, kind: str) -> None:
    """Numbers as large as the real ones, so that nothing overflows on the way through 48 layers."""
    if name == "A_log":
        value.uniform_(0.01, 16).log_()
    elif name == "dt_bias" or ("norm" in path and kind != "Qwen3NextRMSNorm"):
        value.fill_(1.0)
    elif "norm" in path:
        value.zero_()
    else:
        value.normal_(0, 0.02)


def _random_nf4(shape: torch.Size, device: str) -> tuple[torch.Tensor, bnb_functional.QuantState]:
    """Random bytes and the state of a double quantisation whose weights have a standard deviation of about 0.02."""
    blocks = shape.numel() // 64
    second = bnb_functional.QuantState(
        absmax=torch.full((-(-blocks // 256),), 0.01, device=device),
        code=bnb_functional.create_dynamic_map().to(device),
        blocksize=256,
        dtype=torch.float32,
    )
    state = bnb_functional.QuantState(
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=device),
        shape=shape,
        dtype=compute_dtype(device),
        blocksize=64,
        code=bnb_functional.get_4bit_type("nf4", device=device),
        quant_type="nf4",
        offset=torch.tensor(0.05, device=device),
        state2=second,
    )
    return torch.randint(0, 256, (shape.numel() // 2, 1), dtype=torch.uint8, device=device), state


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _memory(device: str) -> float:
    return torch.cuda.memory_allocated() / _GIB if device == "cuda" else _peak(device)


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB


if __name__ == "__main__":
    main()
