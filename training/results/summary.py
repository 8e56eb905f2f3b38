"""Summarises a finished run in numbers: what the app shows as quality_metrics and training_summary."""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import Any

from training.data.corpus import Corpus
from training.data.plan import Plan
from training.results.history import RunHistory

# "The final training loss" is the mean of this many last steps; a single step's is noise.
_LAST_STEPS = 5


def summarise(journal: RunHistory, plan: Plan, corpus: Corpus, trainable: int) -> dict[str, Any]:
    """Keys are the app's where it has one. Losses are mean nats per trained token; perplexity is of the validation."""
    first = journal.evaluations[0].validation_loss if journal.evaluations else None
    best = journal.best
    final = best.validation_loss if best else None
    last = journal.steps[-_LAST_STEPS:]
    training_loss = sum(record.loss for record in last) / len(last) if last else None
    reduction = None
    if first is not None and final is not None and first > 0:
        reduction = 100.0 * (first - final) / first
    elif journal.steps and training_loss is not None and journal.steps[0].loss > 0:
        reduction = 100.0 * (journal.steps[0].loss - training_loss) / journal.steps[0].loss
    steps = journal.steps[-1].step if journal.steps else 0
    return {
        "final_training_loss": training_loss,
        "final_loss": training_loss,
        "initial_validation_loss": first,
        "final_validation_loss": final,
        "best_step": best.step if best else steps,
        "perplexity": math.exp(min(final, 50.0)) if final is not None else None,
        "loss_reduction_percent": reduction,
        "convergence_quality": _convergence(reduction),
        "overall_score": _score(reduction, training_loss, final),
        "epochs_completed": steps / plan.steps_per_epoch,
        "total_steps": steps,
        "training_seconds": journal.training_seconds,
        "tokens": journal.tokens_seen,
        "train_examples": len(corpus.train),
        "validation_examples": len(corpus.validation),
        **corpus.sides(),
        "trainable_parameters": trainable,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
    }


def _convergence(reduction: float | None) -> str:
    """One word for how far the loss fell, in percent of its first value."""
    if reduction is None:
        return "unknown"
    if reduction >= 50:
        return "excellent"
    if reduction >= 25:
        return "good"
    if reduction >= 5:
        return "fair"
    return "poor"


def _score(reduction: float | None, training_loss: float | None, validation_loss: float | None) -> int:
    """1 to 5: how far the loss fell, minus one if the model memorised (validation far above training)."""
    score = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "unknown": 3}[_convergence(reduction)]
    if reduction is not None and reduction < 0:
        score = 1
    if training_loss is not None and validation_loss is not None and validation_loss > 2 * training_loss + 0.5:
        score -= 1
    return max(1, score)
