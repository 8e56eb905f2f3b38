"""Training tokens a second: our trainer beside plain TRL with equal settings, interleaved, on one model.

    python benchmarks/train_throughput.py MODEL_FOLDER [--device cuda] [--rounds 3]

Both read the same tokenised conversations with the same labels, the same NF4 weights, rank, batch and optimizer.
Rounds alternate, so that a busy machine slows both; the last line is the ratio of the medians. With --defaults ours
runs as it does for users (conversations laid end to end, only the answers' tokens scored) against TRL's defaults.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from training.batches import packs_without_leaks
from training.checkpoint import CheckpointShelf
from training.corpus import Corpus, gather
from training.folder import open_model_folder
from training.journal import Journal
from training.lora import attach_adapter
from training.model import compute_dtype, load_base_model
from training.plan import make_plan
from training.spec import Hyperparameters, JobSpec
from training.stop import StopSwitch
from training.template import ChatTemplate
from training.tokenizer import load_tokenizer
from training.trainer import AdapterTrainer
from training.voice import AnyEvent, Voice

_WORDS = ("the", "sea", "is", "wide", "and", "a", "lamp", "turns", "slowly", "while", "ships", "pass", "at", "night")


class _Silent(Voice):
    def say(self, event: AnyEvent) -> None:
        pass


class _Clock(TrainerCallback):
    """Seconds from the end of the first step to the end of the last: libraries warm up in the first."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.last = time.perf_counter()
        if state.global_step == 1:
            self.first = self.last


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--defaults", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        spec = _spec(arguments, Path(root))
        found: dict[str, list[float]] = {"trl": [], "ours": []}
        for _ in range(arguments.rounds):
            for name, speeds in found.items():
                speeds.append(_run(name, spec, packed=arguments.defaults))
                print(f"{name:>5} {speeds[-1]:>9.1f} tokens/s", flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    peak = (
        torch.cuda.max_memory_allocated() / 2**30
        if arguments.device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    print(f"median: ours {medians['ours']:.1f}, plain TRL {medians['trl']:.1f} tokens/s; peak {peak:.2f} GiB")
    print(f"ratio {medians['ours'] / medians['trl']:.2f}")


def _spec(arguments: argparse.Namespace, root: Path) -> JobSpec:
    chosen = random.Random(0)
    rows = []
    for _ in range(arguments.conversations):
        question = " ".join(chosen.choices(_WORDS, k=chosen.randint(10, 40)))
        answer = " ".join(chosen.choices(_WORDS, k=chosen.randint(10, 40)))
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    dataset = root / "data.jsonl"
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return JobSpec(
        job_id="benchmark",
        base_model=arguments.model.name,
        model_path=arguments.model,
        dataset_path=dataset,
        work_dir=root / "work",
        checkpoint_dir=root / "checkpoints",
        output_dir=root / "adapter",
        device=arguments.device,
        checkpoint_seconds=1e9,
        hyperparameters=Hyperparameters(
            batch_size=arguments.batch_size, num_epochs=1, validation_fraction=0.0, lora_dropout=0.0
        ),
    )


def _run(name: str, spec: JobSpec, *, packed: bool) -> float:
    """Tokens a second of one epoch."""
    folder = open_model_folder(spec.model_path, spec.base_model)
    tokenizer = load_tokenizer(folder)
    corpus = gather(spec.dataset_path, None, spec.hyperparameters, ChatTemplate(tokenizer), folder.context_length)
    base = load_base_model(spec, folder)
    model = attach_adapter(base, spec.hyperparameters)
    trainer = (
        _ours(spec, corpus, model, tokenizer, packed=packed and packs_without_leaks(base))
        if name == "ours"
        else _plain_trl(spec, corpus, model, tokenizer)
    )
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    # The first step is not timed, its tokens not counted; batches are equal in size but for the last.
    steps = trainer.state.global_step
    return corpus.train_tokens * (steps - 1) / steps / (clock.last - clock.first)


def _ours(spec: JobSpec, corpus: Corpus, model: Any, tokenizer: Any, *, packed: bool) -> SFTTrainer:
    return AdapterTrainer(
        spec=spec,
        corpus=corpus,
        plan=make_plan(spec, corpus),
        model=model,
        tokenizer=tokenizer,
        shelf=CheckpointShelf(spec.checkpoint_dir, {}),
        journal=Journal(),
        voice=_Silent(-1, spec.job_id),
        stop=StopSwitch(),
        packed=packed,
    )


def _plain_trl(spec: JobSpec, corpus: Corpus, model: Any, tokenizer: Any) -> SFTTrainer:
    plan = make_plan(spec, corpus)
    rows = [{"input_ids": example.input_ids, "labels": example.labels} for example in corpus.train]
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(spec.work_dir / "trl"),
            per_device_train_batch_size=plan.micro_batch,
            gradient_accumulation_steps=plan.accumulation,
            num_train_epochs=1,
            learning_rate=spec.hyperparameters.learning_rate,
            bf16=compute_dtype(spec.device) is torch.bfloat16,
            use_cpu=spec.device == "cpu",
            gradient_checkpointing=spec.device == "cuda",
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    main()
