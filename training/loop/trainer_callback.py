"""A Trainer callback that reports progress each step, evaluates after each epoch and saves checkpoints on a timer."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.data.plan import Plan
from training.data.sampler import mixed_seed
from training.event_writer import EventWriter
from training.events import ErrorCode, Progress, Stage
from training.failures import TrainingFailed
from training.results.history import RunHistory, StepRecord
from training.spec import JobSpec
from training.stop_switch import StopSwitch

if TYPE_CHECKING:
    from training.loop.trainer import AdapterTrainer


class ProgressCallback(TrainerCallback):
    """Reports each step of a run, refuses NaN and infinity, and tells the loop when to evaluate, save and stop."""

    def __init__(
        self,
        *,
        plan: Plan,
        journal: RunHistory,
        voice: EventWriter,
        stop: StopSwitch,
        spec: JobSpec,
        trainer: AdapterTrainer,
    ) -> None:
        self._plan = plan
        self._journal = journal
        self._voice = voice
        self._stop = stop
        self._spec = spec
        self._trainer = trainer
        self._stage = Stage.LOADING
        now = time.monotonic()
        self._step_began = now
        self._checkpoint_at = now
        self._counted_at = now

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self._checkpoint_at = self._counted_at = time.monotonic()
        # The earlier attempt may have ended between the last step of an epoch and its evaluation.
        if state.global_step > 0 and self._is_epoch_end(state.global_step):
            self._trainer.evaluate()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self._enter(Stage.TRAINING)
        self._step_began = time.monotonic()
        self._trainer.tokens_in_step = 0
        # Dropout masks: different for each step and rank, and the same when a step is repeated.
        seed = mixed_seed(self._spec.hyperparameters.seed, state.global_step, self._trainer.ranks.index)
        torch.default_generator.manual_seed(seed)
        # Not torch.manual_seed: without a GPU it records its caller's stack for three kinds of device, at every step.
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        now = time.monotonic()
        self._journal.training_seconds += now - self._counted_at
        self._counted_at = now
        control.should_evaluate = self._is_epoch_end(state.global_step)
        checkpoint_due = now - self._checkpoint_at >= self._spec.checkpoint_seconds
        told = self._trainer.ranks.exchange(
            (self._stop.requested, checkpoint_due, self._trainer.tokens_in_step, self._trainer.micro_batch_tokens)
        )
        self._trainer.tokens_in_step = int(sum(tokens for _, _, tokens, _ in told))
        self._keep_to_the_smallest(int(min(tokens for *_, tokens in told)), state.global_step)
        self._stop.requested = any(stop for stop, *_ in told)
        # Only the first rank's clock decides.
        control.should_save = self._stop.requested or bool(told[0][1])
        control.should_training_stop = control.should_training_stop or self._stop.requested

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Reports the step that was just made."""
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        norm = float(logs["grad_norm"]) if logs.get("grad_norm") is not None else None
        seconds = time.monotonic() - self._step_began
        tokens = self._trainer.tokens_in_step
        record = StepRecord(
            step=state.global_step,
            epoch=state.global_step / self._plan.steps_per_epoch,
            loss=loss,
            learning_rate=float(logs["learning_rate"]),
            grad_norm=norm,
            tokens_per_second=tokens / seconds if seconds > 0 else None,
            tokens_seen=self._journal.tokens_seen + tokens,
        )
        self._journal.steps.append(record)
        self._voice.say(
            Progress(
                job_id=self._voice.job_id,
                step=record.step,
                total_steps=self._plan.total_steps,
                epoch=record.epoch,
                loss=loss,
                learning_rate=record.learning_rate,
                grad_norm=norm,
                tokens_per_second=record.tokens_per_second,
                tokens_seen=record.tokens_seen,
                gpu_memory_gib=_gpu_memory_gib(),
            )
        )
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            raise TrainingFailed(
                ErrorCode.NON_FINITE_LOSS,
                f"training diverged at step {record.step}: loss {loss}, gradient norm {norm}",
                f"lower learning_rate (current {self._spec.hyperparameters.learning_rate:g}) and submit again",
            )

    def _keep_to_the_smallest(self, tokens: int, step: int) -> None:
        """Uses the smallest micro-batch of any rank on all of them: the GPUs are alike."""
        if tokens < self._trainer.micro_batch_tokens:
            self._trainer.micro_batch_tokens = tokens
            self._voice.notice(
                "out_of_memory_recovered",
                f"another GPU ran out of memory: training continues with {tokens} tokens at a time, the batch size "
                f"stays {self._plan.batch_size}",
                micro_batch_tokens=tokens,
                step=step,
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self._checkpoint_at = self._counted_at = time.monotonic()

    def _is_epoch_end(self, step: int) -> bool:
        return step % self._plan.steps_per_epoch == 0

    def _enter(self, stage: Stage) -> None:
        if self._stage is not stage:
            self._stage = stage
            self._voice.stage(stage)


def _gpu_memory_gib() -> float | None:
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 3)
