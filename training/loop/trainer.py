"""The training loop: TRL's SFTTrainer with an exact validation loss and checkpoints that can be resumed exactly."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback
from trl import SFTTrainer

from training.attention.registered import attends_by_borders
from training.data.corpus import Corpus
from training.data.example import Example
from training.data.micro_batches import halve, in_groups, micro_batches, tokens_in
from training.data.plan import Plan
from training.data.sampler import StepOrder
from training.event_writer import EventWriter
from training.events import CheckpointSaved, ErrorCode, Evaluated, Stage
from training.failures import TrainingFailed, is_out_of_memory, memory_advice
from training.loop.arguments import training_arguments
from training.loop.checkpoint import CheckpointShelf
from training.loop.layout import BLANK, CheaperLayout, EpochLoader, as_row, token_count
from training.loop.loss import AnswerLoss
from training.loop.memory_probe import MemoryGauge, tokens_that_fit
from training.loop.trained_tensors import restore_tensors, trained_tensors
from training.loop.trainer_callback import ProgressCallback
from training.quantization.experts import unpack_once_for_backward
from training.ranks import ALONE, Ranks
from training.results.history import EvaluationRecord, RunHistory
from training.results.trackers import tracking_callbacks
from training.spec import JobSpec
from training.stop_switch import StopSwitch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

_WEIGHTS = "adapter.safetensors"
_BEST = "best.safetensors"


class AdapterTrainer(SFTTrainer):  # type: ignore[misc]
    """Trains one job's adapter, reports events, records the run's history, and stops on request."""

    data_collator: Any

    def __init__(
        self,
        *,
        spec: JobSpec,
        corpus: Corpus,
        plan: Plan,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        shelf: CheckpointShelf,
        journal: RunHistory,
        voice: EventWriter,
        stop: StopSwitch,
        packed: bool,
        ranks: Ranks = ALONE,
        is_cut: bool = False,
        gauge: MemoryGauge | None = None,
    ) -> None:
        assert plan.ranks == ranks.count, "the plan is made for another number of processes"
        self.ranks = ranks
        # Ranks that share one sharded model go through each micro-batch together: all need the same number of them.
        self._is_cut = is_cut
        self.spec = spec
        self.plan = plan
        self.journal = journal
        self.best_weights: dict[str, torch.Tensor] = {}
        self._corpus = corpus
        self._shelf = shelf
        self._voice = voice
        self._stop = stop
        self.tokens_in_step = 0
        self._saved_step = 0
        self._packed = packed
        # No probe if an earlier attempt has already probed or halved: that number is kept.
        self._gauge = gauge if journal.micro_batch_tokens is None else None
        super().__init__(
            model=model,
            args=training_arguments(spec, plan, packed=packed),
            # The padding example comes after the last (`StepOrder`).
            train_dataset=Dataset.from_list([as_row(example) for example in (*corpus.train, BLANK)]),
            processing_class=tokenizer,
            callbacks=[
                ProgressCallback(plan=plan, journal=journal, voice=voice, stop=stop, spec=spec, trainer=self),
                *(tracking_callbacks(spec, journal, voice) if ranks.is_first else ()),
            ],
        )
        # TRL casts the adapter of a quantised model to bf16. A resumed run would read it back as float32 and diverge
        # from the uninterrupted one; and bf16 loses small updates.
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # Found once: thousands of frozen modules would be searched several times a step.
        self._trained = tuple(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        self._operations_a_token = 6 * int(self.model.num_parameters(exclude_embeddings=True))
        if self.args.gradient_checkpointing:
            unpack_once_for_backward(self.model)
        self.remove_callback(PrinterCallback)
        if packed:
            self.data_collator = CheaperLayout(
                end_to_end=self.data_collator,
                side_by_side=replace(self.data_collator, padding_free=False),
                hidden_size=int(self.model.config.get_text_config().hidden_size),
                most_tokens=plan.micro_batch_tokens,
                dense=not attends_by_borders(self.model),
            )
        self._answer_loss = AnswerLoss(self.model.get_base_model())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole steps in our own order: the library's order would depend on the number of ranks."""
        order = StepOrder(len(self._corpus.train), self.plan, self.ranks, self.spec.hyperparameters.seed)
        rows = self.train_dataset
        return EpochLoader(
            rows, batch_sampler=order, collate_fn=self.data_collator, pin_memory=self.args.dataloader_pin_memory
        )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Mixed precision, but no DistributedDataParallel around the model: see `Ranks.average_gradients`.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """This rank's share of a step, forward and backward, in as few micro-batches as memory allows.

        If memory runs out, the rest of the run uses half the tokens. The step is repeated, not lost, and the effective
        batch stays as requested. Raises TrainingFailed(out_of_memory) if a single conversation does not fit.
        """
        self._fit_micro_batches_to_the_card(model)
        self.tokens_in_step += token_count(inputs)
        pending = self._micro_batches(self._prepare_inputs(inputs))
        total = torch.zeros((), device=self.args.device)
        while pending:
            before = {parameter: parameter.grad.clone() for parameter in self._trained if parameter.grad is not None}
            try:
                total += super().training_step(model, pending[0], num_items_in_batch)
                pending.pop(0)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._is_cut:
                    raise
            # Outside the except block, so that the failed pass's tensors are freed before the next try. Backward may
            # have stopped half way: restore the gradients.
            for parameter in self._trained:
                parameter.grad = before.get(parameter)
            parts = [*self._halve(pending.pop(0)), *pending]
            pending = [smaller for part in parts for smaller in micro_batches(part, self.micro_batch_tokens)]
        self.ranks.average_gradients(self._trained)
        return total

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens per micro-batch: as planned, as found by the probe, or fewer since memory ran out."""
        return self.journal.micro_batch_tokens or self.plan.micro_batch_tokens

    @micro_batch_tokens.setter
    def micro_batch_tokens(self, tokens: int) -> None:
        self.journal.micro_batch_tokens = tokens

    def floating_point_ops(self, inputs: Any) -> int:
        """The library's number, for trackers; the library would count the parameters again at each step."""
        return tokens_in(inputs) * self._operations_a_token

    def _clip_grad_norm(self, _model: Any) -> torch.Tensor:
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)
        return norm

    def _micro_batches(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        parts = micro_batches(inputs, self.micro_batch_tokens)
        return [*parts, *[self._collate([BLANK])] * self._missing(len(parts))]

    def _missing(self, parts: int) -> int:
        """How many more micro-batches another rank has, where all must go through the same number."""
        if not self._is_cut:
            return 0
        return int(max(count for (count,) in self.ranks.exchange([parts]))) - parts

    def _collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        inputs: dict[str, Any] = self._prepare_inputs(self.data_collator([as_row(example) for example in examples]))
        return inputs

    def _fit_micro_batches_to_the_card(self, model: Any) -> None:
        """Probes once, before the first step, how many tokens fit into the GPU. Ranks agree on the smallest result."""
        gauge, self._gauge = self._gauge, None
        if gauge is None:
            return
        planned = self.plan.micro_batch_tokens
        by_length = sorted(self._corpus.train, key=lambda example: len(example.input_ids), reverse=True)
        parts = micro_batches(self._collate(by_length[: self.plan.share]), planned)
        if len(parts) == 1:
            # The longest step fits into one micro-batch as planned: there is nothing to find.
            return
        mine = self._tokens_that_fit(model, max(parts, key=tokens_in), gauge)
        fitting = int(min(tokens for (tokens,) in self.ranks.exchange([mine])))
        if fitting != planned:
            self.micro_batch_tokens = fitting
            self._voice.notice(
                "micro_batch_fitted",
                f"micro-batches have {fitting} tokens instead of {planned}, as many as fit in the memory of this GPU",
                micro_batch_tokens=fitting,
            )

    def _tokens_that_fit(self, model: Any, heaviest: dict[str, Any], gauge: MemoryGauge) -> int:
        """Runs one micro-batch and measures its memory. Leaves no gradient and uses up no random number."""
        if self.journal.micro_batch_tokens is not None:
            # Memory already ran out in the first evaluation.
            return self.journal.micro_batch_tokens
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            in_use = gauge.begin()
            try:
                super().training_step(model, heaviest)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._is_cut:
                    raise
                return self.plan.micro_batch_tokens // 2
            finally:
                model.zero_grad()
        planned, tried = self.plan.micro_batch_tokens, tokens_in(heaviest)
        return tokens_that_fit(planned, tried, in_use=in_use, peak=gauge.peak(), capacity=gauge.capacity())

    def _halve(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halves = halve(inputs)
        if halves is None:
            raise TrainingFailed(
                ErrorCode.OUT_OF_MEMORY,
                f"memory ran out with a single conversation of {inputs['input_ids'].shape[1]} tokens at a time",
                memory_advice(self.spec, self._corpus.max_length),
            )
        self.micro_batch_tokens = max(tokens_in(half) for half in halves)
        self._voice.notice(
            "out_of_memory_recovered",
            f"memory ran out: training continues with {self.micro_batch_tokens} tokens at a time, the batch size stays "
            f"{self.spec.hyperparameters.batch_size}",
            micro_batch_tokens=self.micro_batch_tokens,
            step=self.state.global_step,
        )
        return halves

    def compute_loss(
        self,
        _model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """Loss of one micro-batch, as its share of the mean over all trained tokens of the optimizer step."""
        assert not return_outputs, "nothing here asks for logits"
        summed, count = self._answer_loss(inputs)
        # The token count covers all ranks, while gradients and logged losses are averaged over ranks.
        share: float = count if num_items_in_batch is None else num_items_in_batch / self.ranks.count
        return summed / share

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Returns the mean loss over every trained token of the held-out conversations, however they are batched.

        (The library's own loop averages the means of batches, which gives a short answer the weight of a long one, and
        draws from dropout's random generator.) If interrupted by a stop request it records nothing.
        """
        if not self._corpus.validation or self.journal.evaluated(self.state.global_step):
            return {}
        self._voice.stage(Stage.EVALUATING)
        was_training = self.model.training
        self.model.eval()
        total = tokens = 0.0
        pending = self._held_out_batches()
        while pending and (self._is_cut or not self._stop.requested):
            try:
                summed, count = self._summed_loss(pending[0])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self._is_cut:
                    raise
            else:
                total += summed
                tokens += count
                pending.pop(0)
                continue
            self._halve(self._collate(pending[0]))
            pending = self._together([example for batch in pending for example in batch])
        self.model.train(was_training)
        if self.ranks.agree_to_stop(self._stop):
            self.control.should_save = self.control.should_training_stop = True
            return {}
        total, tokens = self.ranks.total(total, tokens)
        loss = total / max(1, tokens)
        step = self.state.global_step
        record = EvaluationRecord(step=step, epoch=step / self.plan.steps_per_epoch, validation_loss=loss)
        self.journal.evaluations.append(record)
        self._voice.say(
            Evaluated(job_id=self._voice.job_id, step=step, epoch=record.epoch, validation_loss=record.validation_loss)
        )
        # The library notifies its callbacks in the loop that this one replaces.
        self.callback_handler.on_log(self.args, self.state, self.control, {"eval_loss": loss})
        if self.journal.best is record:
            self.best_weights = trained_tensors(self.model)
        elif self._patience_is_over():
            self._voice.notice(
                "stopped_early",
                f"the validation loss did not improve in {self.spec.hyperparameters.early_stopping_patience} "
                f"evaluations; the adapter of step {self.journal.best.step if self.journal.best else 0} is kept",
            )
            self.control.should_training_stop = True
        return {"eval_loss": loss}

    def _held_out_batches(self) -> list[list[Example]]:
        """This rank's share of the held-out conversations, shortest first."""
        in_order = sorted(self._corpus.validation, key=lambda example: len(example.input_ids))
        batches = self._together(self.ranks.share(in_order))
        return [*batches, *[[BLANK]] * self._missing(len(batches))]

    def _together(self, examples: Sequence[Example]) -> list[list[Example]]:
        lengths = [len(example.input_ids) for example in examples]
        groups = in_groups(lengths, self.micro_batch_tokens, padded=not self._packed)
        return [list(examples[group]) for group in groups]

    def _patience_is_over(self) -> bool:
        patience, best = self.spec.hyperparameters.early_stopping_patience, self.journal.best
        if patience is None or best is None:
            return False
        return sum(record.step > best.step for record in self.journal.evaluations) >= patience

    def _summed_loss(self, batch: list[Example]) -> tuple[float, int]:
        """Returns the summed loss of some conversations and the number of tokens in the sum."""
        inputs = self._collate(batch)
        with torch.no_grad(), self.compute_loss_context_manager():
            summed, count = self._answer_loss(inputs)
        return summed.item(), count

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002 - the library's signature
        if not self.ranks.is_first:
            return
        folder = self._shelf.prepare()
        save_file(trained_tensors(self.model), folder / _WEIGHTS)
        if self.best_weights:
            save_file(self.best_weights, folder / _BEST)
        self._save_optimizer_and_scheduler(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        self.journal.save(folder)
        saved = self._shelf.publish(folder, self.state.global_step)
        self._saved_step = saved.step
        self._voice.say(
            CheckpointSaved(job_id=self._voice.job_id, step=saved.step, path=str(saved.path), bytes=saved.bytes)
        )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Does nothing: each step's random numbers come from seed, rank and step (ProgressCallback)."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        """Restores exactly the tensors that were written; PEFT's loading would convert names on the way."""
        folder = Path(resume_from_checkpoint)
        restore_tensors(self.model, load_file(folder / _WEIGHTS))
        self.best_weights = load_file(folder / _BEST) if (folder / _BEST).exists() else {}

    def leave_checkpoint(self) -> None:
        """Saves a last checkpoint before the process ends, unless the newest one is up to date."""
        if self.state.global_step > self._saved_step:
            self._save_checkpoint(self.model, None)

    def keep_best(self) -> None:
        """Restores the weights of the best evaluation."""
        if self.best_weights:
            restore_tensors(self.model, self.best_weights)

    def create_model_card(self, *_args: Any, **_kwargs: Any) -> None:
        """Disabled: the library's generic model card says nothing about this run."""
