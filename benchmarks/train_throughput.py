"""Training tokens a second: our trainer and plain TRL, interleaved, on a dense model and on a mixture of experts.

    python benchmarks/train_throughput.py                  both models, every dataset; up to five rounds, 5 minutes each
    python benchmarks/train_throughput.py --device cuda --dense MODEL_FOLDER --conversations 2000

The dense model is the demo's (SmolLM2-135M-Instruct, converted on first use), the mixture a small Qwen3-MoE with random
weights. A contestant makes one pass over a dataset; two are compared on the same tokenised conversations, the same
NF4 weights, the same adapter (rank, targets, dropout, initial values) and the same held-out conversations:
- defaults: what a user of each gets without choosing anything. TRL has SFTConfig's values: 8 conversations a batch,
  padded, activations recomputed, learning rate 2e-5, loss on every token. Ours: 4 a batch, end to end, loss on answers;
- equal settings: batch, learning rate and its schedule, trained tokens, optimizer, padding and activations as ours.
Plain TRL cannot load experts in 4 bits: it gets ours, which it unpacks again in every pass. Our trainer, as in every
job, unpacks frozen weights once where the host has memory to spare (training/quantization/dequantized_cache.py): the
clock and the peak show the cost of that.

Each model has a separate process, as jobs have: a heap that has held one model slows the other by a fifth. Only the
training is timed, from its first to its last step. Each round runs everything once, and rounds start with the two
contestants in turn, so that a busy machine slows both. Speeds are medians; a ratio is the median of the rounds' ratios.
`held out` is the mean loss of the answers' tokens in conversations that neither was trained on, measured in the same
way for both. Peak is the process's resident memory while it trains (on a GPU, the GPU's).

One thing is not TRL's default: it would compute in bf16 everywhere, which is sixty times slower on a CPU without bf16
units; there both compute in float32. Exit status 1 if a promise of the last lines is broken.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from datasets import Dataset, disable_progress_bars
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import Linear4bit as PeftLinear4bit
from transformers import TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from daemon.demo.model import MODEL_NAME, find_gguf, model_is_ready, models_folder
from tests.tiny_models import make_model
from training.adapter.frozen_linear import Frozen4bitLinearWithLora, FrozenLinearWithLora
from training.adapter.lora import attach_adapter
from training.base.architecture import architecture_of
from training.base.dtype import compute_dtype
from training.base.gguf_import import import_gguf
from training.base.load import load_base_model
from training.base.sequence_packing import packs_without_leaks
from training.data.chat_template import ChatTemplate
from training.data.corpus import Corpus, gather
from training.data.example import Example
from training.data.plan import make_plan
from training.data.tokenizer import load_tokenizer
from training.event_writer import AnyEvent, EventWriter
from training.files.model_folder import open_model_folder
from training.loop.checkpoint import CheckpointShelf
from training.loop.loss import AnswerLoss
from training.loop.trainer import AdapterTrainer
from training.preflight.check import plan_and_estimate
from training.quantization.dequantized_cache import keep_unpacked, spare_bytes
from training.results.history import RunHistory
from training.spec import Hyperparameters, JobSpec
from training.stop_switch import StopSwitch

# Large enough that the experts' products outweigh the Python around them, small enough for two cores.
_MIXTURE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
_COLOURS = dict(zip(("cat", "dog", "ship", "tree", "star", "lamp", "book", "road", "fish", "bird"),
                    ("red", "blue", "green", "black", "white") * 2, strict=True))  # fmt: skip
_HELD_OUT = 8
_PEFTS = {FrozenLinearWithLora: PeftLinear, Frozen4bitLinearWithLora: PeftLinear4bit}
# So small a mixture is so fast that four steps would mostly show the cost of starting.
_TIMES = {"dense": 1, "mixture": 6}


class _Silent(EventWriter):
    def say(self, event: AnyEvent) -> None:
        pass


class _Clock(TrainerCallback):
    """Seconds of the training loop, from its first step to its last."""

    def __init__(self) -> None:
        self._began = 0.0
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began


class _UnpackOnTheClock(TrainerCallback):
    """Does in the first step what a job does before its first evaluation, so that it is timed."""

    def __init__(self, model: Any, spare: int) -> None:
        self._model = model
        self._spare = spare

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == 0:
            keep_unpacked(self._model, self._spare)


@dataclass(frozen=True)
class Run:
    """One pass over a dataset by one contestant."""

    tokens_per_second: float
    held_out_loss: float
    peak_gib: float


Contestant = Callable[[JobSpec, Corpus, Any, Any], SFTTrainer]


@dataclass(frozen=True)
class Match:
    """Two contestants on one dataset, with one run of each in every round."""

    model: str
    settings: str
    dataset: str
    spec: JobSpec
    ours: list[Run] = field(default_factory=list)
    theirs: list[Run] = field(default_factory=list)

    def play(self, ours: Contestant, theirs: Contestant) -> None:
        turns = [(ours, self.ours), (theirs, self.theirs)]
        for contestant, runs in turns if len(self.ours) % 2 == 0 else reversed(turns):
            runs.append(run(contestant, self.spec))

    @property
    def name(self) -> str:
        return f"{self.model}, {self.settings}, {self.dataset}"

    @property
    def ratio(self) -> float:
        return statistics.median(
            ours.tokens_per_second / theirs.tokens_per_second
            for ours, theirs in zip(self.ours, self.theirs, strict=True)
        )

    def line(self) -> str:
        columns = [self.dataset]
        for runs in (self.ours, self.theirs):
            columns.append(f"{statistics.median(run.tokens_per_second for run in runs):.0f}")
        columns.append(f"**{self.ratio:.2f}**")
        columns += [f"{runs[0].held_out_loss:.3f}" for runs in (self.ours, self.theirs)]
        columns += [f"{max(run.peak_gib for run in runs):.2f}" for runs in (self.ours, self.theirs)]
        return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(_TIMES), help="one of the two; without it both, one after the other")
    parser.add_argument("--dense", type=Path, help="another dense model's folder")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=5, help="at most; one is always played")
    parser.add_argument("--minutes", type=float, default=5.0, help="of a model: no round is begun that would end later")
    parser.add_argument(
        "--conversations",
        type=int,
        default=16,
        help="in a dataset (six times as many for the mixture); half of it where all are long",
    )
    arguments = parser.parse_args()
    if arguments.model is None:
        runs = [subprocess.run([sys.executable, *sys.argv, "--model", kind], check=False) for kind in _TIMES]
        sys.exit(max(run.returncode for run in runs))
    kind = arguments.model
    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        if kind == "mixture":
            model = make_model(root / "Qwen3-MoE, random", "qwen3_moe", **_MIXTURE)
        else:
            model = arguments.dense or demo_model()
        datasets = write_datasets(root / "datasets", _TIMES[kind] * arguments.conversations)
        matches = [
            Match(f"{kind} ({model.name})", settings, name, _spec(model, datasets[name], arguments.device, root))
            for settings, contest in _CONTESTS.items()
            for name in contest.datasets
        ]
        # Once, untimed: this writes the quantised copies and brings libraries to their working size.
        run(_ours_by_default, _spec(model, datasets["warm-up"], arguments.device, root))
        for number in range(arguments.rounds):
            round_began = time.monotonic()
            for match in matches:
                match.play(_CONTESTS[match.settings].ours, _CONTESTS[match.settings].theirs)
                print(f"round {number + 1}: {match.name}, {match.ratio:.2f}", file=sys.stderr, flush=True)
            now = time.monotonic()
            if now + (now - round_began) > began + 60 * arguments.minutes:
                break
    print(f"{_machine(arguments.device)}; rounds: {len(matches[0].ours)}, load {os.getloadavg()[0]:.1f}")
    for (model, settings), lines in groupby(matches, key=lambda match: (match.model, match.settings)):
        print(f"\n### {model}, {settings}\n\n{_HEAD}")
        print("\n".join(match.line() for match in lines))
    if broken := list(broken_promises(matches)):
        sys.exit("\n" + "\n".join(f"broken: {promise}" for promise in broken))
    print("\nheld: nowhere slower by default, 1.5 times as fast on short conversations, no held-out loss higher; "
          "with equal settings nowhere slower than 0.95")  # fmt: skip


_HEAD = (
    "| conversations | ours, tokens/s | TRL, tokens/s | ratio | held out: ours | TRL | peak GiB: ours | TRL |\n"
    "|---|---|---|---|---|---|---|---|"
)


def broken_promises(matches: Iterable[Match]) -> Iterable[str]:
    for match in matches:
        # Runs of equal work differ with other load on the machine: by five in a hundred.
        least = 0.95 if match.settings == "equal settings" else 1.5 if match.dataset == "short" else 1.0
        if match.ratio < least:
            yield f"{match.name}: {match.ratio:.2f} times TRL's tokens a second, at least {least} promised"
        ours, theirs = match.ours[0].held_out_loss, match.theirs[0].held_out_loss
        if match.settings == "defaults" and ours > theirs:
            yield f"{match.name}: held-out loss {ours:.3f}, TRL's {theirs:.3f}"


def demo_model() -> Path:
    """Returns the demo's own copy, made now if it does not exist."""
    folder = models_folder() / MODEL_NAME
    if not model_is_ready():
        import_gguf(find_gguf(), folder)
    return folder


def write_datasets(root: Path, conversations: int) -> dict[str, Path]:
    """Questions about the colours of things, which never change; they differ in how many things they ask about."""
    lengths = random.Random(0)
    counts = {
        "short": [lengths.randint(1, 5) for _ in range(conversations)],
        # Most are as short as those above; one in sixteen is ten times as long.
        "long-tailed": [30 if n % 16 == 0 else lengths.randint(1, 5) for n in range(conversations)],
        "long": [lengths.randint(18, 24) for _ in range(conversations // 2)],
        "warm-up": [1, 1, 1, 1],
    }
    written = {}
    for name, things in counts.items():
        held_out = [lengths.choice(things) for _ in range(_HELD_OUT)]
        written[name] = root / name
        written[name].mkdir(parents=True)
        for file, part in (("train.jsonl", things), ("held_out.jsonl", held_out)):
            lines = [json.dumps(_conversation(lengths, count)) + "\n" for count in part]
            (written[name] / file).write_text("".join(lines), encoding="utf-8")
    return written


def _conversation(chosen: random.Random, things: int) -> dict[str, Any]:
    asked = chosen.choices(list(_COLOURS), k=things)
    answer = " ".join(f"The {thing} is {_COLOURS[thing]}." for thing in asked)
    question = f"Which colour has the {', the '.join(asked)}?"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _spec(model: Path, dataset: Path, device: str, root: Path) -> JobSpec:
    return JobSpec(
        job_id="benchmark",
        base_model="measured/model",
        model_path=model,
        dataset_path=dataset / "train.jsonl",
        validation_path=dataset / "held_out.jsonl",
        work_dir=root / "work",
        checkpoint_dir=root / "checkpoints",
        output_dir=root / "adapter",
        quantized_dir=root / "quantized",
        device="cuda" if device == "cuda" else "cpu",
        checkpoint_seconds=1e9,
        hyperparameters=Hyperparameters(num_epochs=1),
    )


def run(contestant: Contestant, spec: JobSpec) -> Run:
    folder = open_model_folder(spec.model_path, spec.base_model)
    tokenizer = load_tokenizer(folder)
    template = ChatTemplate(tokenizer)
    reads = architecture_of(folder, spec.base_model).context_length
    corpus = gather(spec.dataset_path, spec.validation_path, spec.hyperparameters, template, reads)
    model = attach_adapter(load_base_model(spec, folder), spec.hyperparameters)
    trainer = contestant(spec, corpus, model, tokenizer)
    if compute_dtype(spec.device) is torch.float32:
        # TRL makes the adapter of a quantised model bf16.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    clock = _Clock()
    trainer.add_callback(clock)
    _forget_peak()
    trainer.train()
    return Run(corpus.train_tokens / clock.seconds, _held_out_loss(trainer, corpus.validation), _peak_gib())


def _ours_by_default(spec: JobSpec, corpus: Corpus, model: Any, tokenizer: Any) -> SFTTrainer:
    return _ours(spec, corpus, model, tokenizer, packed=packs_without_leaks(model.get_base_model()))


def _ours_padded(spec: JobSpec, corpus: Corpus, model: Any, tokenizer: Any) -> SFTTrainer:
    return _ours(spec, corpus, model, tokenizer, packed=False)


def _ours(spec: JobSpec, corpus: Corpus, model: Any, tokenizer: Any, *, packed: bool) -> SFTTrainer:
    plan, estimate = plan_and_estimate(spec, open_model_folder(spec.model_path, spec.base_model), corpus)
    trainer = AdapterTrainer(
        spec=spec,
        corpus=Corpus(corpus.train, (), (), corpus.max_length, corpus.format, ()),
        plan=plan,
        model=model,
        tokenizer=tokenizer,
        shelf=CheckpointShelf(spec.checkpoint_dir, {}),
        journal=RunHistory(),
        voice=_Silent(-1, spec.job_id),
        stop=StopSwitch(),
        packed=packed,
    )
    trainer.add_callback(_UnpackOnTheClock(model, spare_bytes(spec, estimate)))
    return trainer


def _plain_trl_defaults(spec: JobSpec, corpus: Corpus, model: Any, tokenizer: Any) -> SFTTrainer:
    rows = [{"input_ids": example.input_ids} for example in corpus.train]
    return _plain_trl(spec, rows, model, tokenizer)


def _plain_trl_like_ours(spec: JobSpec, corpus: Corpus, model: Any, tokenizer: Any) -> SFTTrainer:
    rows = [{"input_ids": example.input_ids, "labels": example.labels} for example in corpus.train]
    plan = make_plan(spec, corpus)
    return _plain_trl(
        spec,
        rows,
        model,
        tokenizer,
        per_device_train_batch_size=plan.batch_size,
        learning_rate=spec.hyperparameters.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=plan.warmup_steps,
        gradient_checkpointing=spec.device == "cuda",
        router_aux_loss_coef=0.0,
        logging_steps=1,
    )


def _plain_trl(spec: JobSpec, rows: list[dict[str, Any]], model: Any, tokenizer: Any, **chosen: Any) -> SFTTrainer:
    arguments = SFTConfig(
        output_dir=str(spec.work_dir / "trl"),
        num_train_epochs=1,
        bf16=compute_dtype(spec.device) is torch.bfloat16,
        use_cpu=spec.device == "cpu",
        seed=spec.hyperparameters.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **chosen,
    )
    for module in model.modules():
        # Plain TRL computes LoRA in PEFT's own layers.
        module.__class__ = _PEFTS.get(type(module), type(module))
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


@dataclass(frozen=True)
class _Contest:
    ours: Contestant
    theirs: Contestant
    datasets: tuple[str, ...]


_CONTESTS = {
    "defaults": _Contest(_ours_by_default, _plain_trl_defaults, ("short", "long-tailed", "long")),
    "equal settings": _Contest(_ours_padded, _plain_trl_like_ours, ("short",)),
}


def _held_out_loss(trainer: SFTTrainer, examples: Iterable[Example]) -> float:
    """Returns the mean over the answers' tokens, one conversation at a time."""
    model: Any = trainer.model
    model.eval()
    loss = AnswerLoss(model.get_base_model())
    total = tokens = 0.0
    for example in examples:
        inputs = {"input_ids": torch.tensor([example.input_ids]), "labels": torch.tensor([example.labels])}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            summed, count = loss({key: value.to(model.device) for key, value in inputs.items()})
        total += summed.item()
        tokens += count
    return total / tokens


def _forget_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # 5 resets VmHWM to what is resident now (man proc_pid_clear_refs).
    Path("/proc/self/clear_refs").write_text("5")


def _peak_gib() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 2**20


def _machine(device: str) -> str:
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "bitsandbytes"))
    return f"{machine}, computed in {str(compute_dtype(device)).removeprefix('torch.')}; {versions}"


if __name__ == "__main__":
    main()
