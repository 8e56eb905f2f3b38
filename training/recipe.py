"""The whole method, from a spec to an adapter. Start reading here.

A base model is frozen in four bits. Small float32 matrices beside its linear layers, the adapter, are the only part
that learns. They learn from conversations, rendered with the chat template that the model will be used with, and only
from the assistant's words. Some conversations are held out. The loss on those shows whether the model learned or
memorised, and the adapter that did best on them is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from training.adapter.describe import Describer
from training.adapter.lora import attach_adapter, choose_targets, trainable_parameters
from training.adapter.sampling import answer, choose_prompts
from training.adapter.save import save_adapter
from training.attention.choice import choose_packed_attention
from training.base.architecture import Architecture, architecture_of
from training.base.load import load_base_model, warn_of_missing_kernels
from training.base.rehearsal import rehearse_loading
from training.base.sequence_packing import why_not_packed
from training.base.sharded import cut, memory_of_a_rank, must_be_cut
from training.data.chat_template import ChatTemplate
from training.data.corpus import Corpus, gather
from training.data.plan import Plan
from training.data.tokenizer import load_tokenizer, stop_tokens
from training.event_writer import EventWriter
from training.events import AdapterAttached, AdapterSaved, Planned, Stage
from training.failures import StopRequested
from training.files.model_folder import ModelFolder, open_model_folder
from training.loop.checkpoint import Checkpoint, CheckpointShelf
from training.loop.memory_probe import gauge_of
from training.loop.trainer import AdapterTrainer
from training.preflight.check import check_resources, memory_remark, plan_and_estimate
from training.preflight.estimate import Estimate
from training.preflight.kernel_proof import refuse_wrong_kernels
from training.preflight.trained_with import trained_with
from training.quantization.choose_product import choose_products
from training.quantization.dequantized_cache import keep_unpacked, spare_bytes
from training.quantization.grouped_product import Choice
from training.ranks import ALONE, Ranks
from training.results.chart import draw_chart
from training.results.history import RunHistory
from training.results.summary import summarise
from training.results.trackers import tracked_files
from training.spec import JobSpec
from training.stop_switch import StopSwitch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """Everything known before a model is needed: the data, its tokens, and the number of steps."""

    folder: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    corpus: Corpus
    plan: Plan
    estimate: Estimate
    is_cut: bool = False


def train_adapter(spec: JobSpec, voice: EventWriter, stop: StopSwitch, ranks: Ranks = ALONE) -> None:
    """Runs one job. Ends with `adapter_saved`; raises TrainingFailed, or StopRequested once a checkpoint is on disk.

    With several ranks, each does all of this on its share of the conversations; only the first writes files.
    """
    # The data first: they are wrong most often, and checking them takes a second.
    prepared = prepare(spec, voice)
    voice.stage(Stage.LOADING, spec.base_model)
    train_on(_load_on_ranks(prepared, spec, voice, ranks), prepared, spec, voice, stop, ranks=ranks)


def _load_on_ranks(prepared: Prepared, spec: JobSpec, voice: EventWriter, ranks: Ranks) -> PreTrainedModel:
    """Loads the base model: whole on each GPU, or sharded over all of them."""
    folder = prepared.folder
    if prepared.is_cut:
        voice.notice(
            "model_cut",
            f"{spec.base_model} is too large for one GPU: its layers are sharded over {ranks.count} GPUs",
        )
        return ranks.one_by_one(
            lambda: cut(
                load_base_model(spec, folder, voice, device=torch.device("cpu")), ranks, torch.device(spec.device)
            )
        )
    if ranks.count > 1 and spec.quantize and spec.quantized_dir is not None:
        # If there is no 4-bit copy yet, the first rank writes it and the others read it.
        return ranks.one_after_the_first(lambda: load_base_model(spec, folder, voice))
    return load_base_model(spec, folder, voice)


def prepare(spec: JobSpec, voice: EventWriter, tokenizer: PreTrainedTokenizerBase | None = None) -> Prepared:
    """Reads the data, plans and estimates, without a model. `tokenizer` is the base model's if it is loaded already."""
    folder = open_model_folder(spec.model_path, spec.base_model)
    architecture = _rehearse(spec, folder) if tokenizer is None else architecture_of(folder, spec.base_model)
    tokenizer = load_tokenizer(folder) if tokenizer is None else tokenizer
    template = ChatTemplate(tokenizer, stops=stop_tokens(folder), today=spec.today)
    corpus = gather(
        spec.dataset_path,
        spec.validation_path,
        spec.hyperparameters,
        template,
        architecture.context_length,
        tick=voice.preparing,
    )
    corpus.announce(voice)
    plan, estimate = plan_and_estimate(spec, folder, corpus)
    memory = memory_of_a_rank(spec, estimate)
    is_cut = must_be_cut(spec, folder, estimate, memory.total_bytes)
    if is_cut:
        memory = memory.times(spec.num_gpus)
    check_resources(spec, estimate, memory)
    refuse_wrong_kernels(spec, folder)
    if warning := memory_remark(spec, estimate, memory):
        voice.notice("memory_tight", warning)
    if plan.idle_ranks:
        voice.notice(
            "gpus_idle",
            f"a batch_size of {plan.batch_size} keeps {plan.batch_size} of {plan.ranks} GPUs busy; "
            f"ask for fewer GPUs or a batch_size of at least {plan.ranks}",
        )
    voice.say(
        Planned(
            job_id=spec.job_id,
            total_steps=plan.total_steps,
            total_epochs=plan.epochs,
            train_examples=len(corpus.train),
            validation_examples=len(corpus.validation),
            **corpus.sides(),
            train_tokens=corpus.train_tokens,
            trained_tokens=corpus.trained_tokens,
            max_length=corpus.max_length,
            compute_type=plan.compute_type,
            trained_with=trained_with(spec, corpus, plan),
            data={**corpus.statistics(), "estimate": estimate.as_dict()},
        )
    )
    return Prepared(folder, tokenizer, template, corpus, plan, estimate, is_cut)


def _rehearse(spec: JobSpec, folder: ModelFolder) -> Architecture:
    """Refuses what cannot be loaded, or has no such layers to adapt, before hours and gigabytes are spent on it."""
    found = rehearse_loading(spec, folder)
    choose_targets(found.model, spec.hyperparameters.target_modules)
    return found.architecture


def train_on(
    base: PreTrainedModel,
    prepared: Prepared,
    spec: JobSpec,
    voice: EventWriter,
    stop: StopSwitch,
    *,
    ranks: Ranks = ALONE,
) -> None:
    """Trains an adapter on a freshly loaded base model. The model carries the adapter afterwards: do not reuse it."""
    corpus, plan, tokenizer, template = prepared.corpus, prepared.plan, prepared.tokenizer, prepared.template

    # The model: frozen, four bits; the adapter: small, float32, the only part that learns.
    warn_of_missing_kernels(spec, base, voice)
    packed = may_pack(spec, base, voice, [len(example.input_ids) for example in corpus.train])
    model = attach_adapter(base, spec.hyperparameters)
    voice.say(
        AdapterAttached(
            job_id=spec.job_id,
            target_modules=tuple(sorted(model.peft_config["default"].target_modules)),
            packing=packed,
            trainable_parameters=trainable_parameters(model),
        )
    )

    # Training, from the start or from an earlier attempt's checkpoint.
    shelf = CheckpointShelf(spec.checkpoint_dir, fingerprint=_fingerprint(spec, plan, corpus))
    checkpoint = ranks.as_the_first(lambda: _find_checkpoint(shelf, voice))
    journal = RunHistory.load(checkpoint.path) if checkpoint else RunHistory()
    _keep_what_fits(base, prepared, spec, voice)
    trainer = AdapterTrainer(
        spec=spec,
        corpus=corpus,
        plan=plan,
        model=model,
        tokenizer=tokenizer,
        shelf=shelf,
        journal=journal,
        voice=voice,
        stop=stop,
        packed=packed,
        ranks=ranks,
        is_cut=prepared.is_cut,
        gauge=gauge_of(spec.device),
    )
    _choose_how_experts_are_multiplied(base, prepared, spec, journal, voice)
    prompts = choose_prompts(spec, corpus)
    if checkpoint is None:
        for prompt, text in answer(spec, trainer.model, tokenizer, template, prompts):
            voice.sample("before", prompt, text)
    with stop.at_the_next_step():
        if checkpoint is None:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        if ranks.agree_to_stop(stop):
            trainer.leave_checkpoint()
            raise StopRequested
    trainer.keep_best()
    for prompt, text in answer(spec, trainer.model, tokenizer, template, prompts):
        voice.sample("after", prompt, text)

    if not ranks.is_first:
        return
    # The adapter, with the settings and the history of the run beside it.
    voice.stage(Stage.SAVING)
    log, chart = spec.work_dir / "training_log.jsonl", spec.work_dir / "metrics_chart.png"
    journal.write_log(log)
    draw_chart(journal, chart, title=f"{spec.base_model}, r = {spec.hyperparameters.lora_rank}")
    summary = summarise(journal, plan, corpus, trainable_parameters(trainer.model))
    describe = Describer(prepared.folder, template, journal, trained_with(spec, corpus, plan), summary)
    described = save_adapter(spec, trainer.model, tokenizer, (log, chart, *tracked_files(spec)), describe)
    voice.say(AdapterSaved(job_id=spec.job_id, path=str(spec.output_dir), summary=summary, serving=described.serving))


def may_pack(spec: JobSpec, base: PreTrainedModel, voice: EventWriter, lengths: Sequence[int] = ()) -> bool:
    """True if a micro-batch's conversations may be laid end to end instead of padded, without changing the result.

    Then the model also attends in such rows as cheaply as has been proven equal. `lengths`: of the conversations, in
    tokens.
    """
    if spec.hyperparameters.packing is False:
        return False
    attention = choose_packed_attention(base, lengths)
    reason = why_not_packed(base)
    if reason is not None:
        voice.notice("packing_refused", f"packing is off and conversations are padded instead: {reason}", reason=reason)
        return False
    if attention.dense_because is not None:
        voice.notice(
            "attention_dense",
            "packed rows take longer: attention compares all their conversations with each other and masks the "
            f"result, because {attention.dense_because}",
            reason=attention.dense_because,
        )
    for fault in attention.dropped:
        voice.notice(
            "kernel_dropped",
            f"attention in packed rows takes one conversation at a time instead of the GPU's kernel for all: {fault}",
            kernel="varlen",
            reason=fault,
        )
    return True


def _keep_what_fits(base: PreTrainedModel, prepared: Prepared, spec: JobSpec, voice: EventWriter) -> None:
    """Keeps frozen weights dequantised for the whole run where memory is left, and reports how much it took."""
    if prepared.is_cut:
        return
    kept = keep_unpacked(base, spare_bytes(spec, prepared.estimate))
    if kept.weights:
        voice.notice(
            "weights_unpacked",
            f"{kept.weights} of {kept.of_weights} frozen weights stay dequantised, in {kept.bytes / 2**30:.2f} GiB of "
            "free memory: they are dequantised once and not in every step",
            bytes=kept.bytes,
        )


def _choose_how_experts_are_multiplied(
    base: PreTrainedModel, prepared: Prepared, spec: JobSpec, journal: RunHistory, voice: EventWriter
) -> None:
    """On a GPU: takes the fastest of the implementations that are right there, and reports what was tried."""
    if spec.device != "cuda" or prepared.is_cut:
        return
    earlier = {shape: Choice.from_json(choice) for shape, choice in journal.experts_product.items()}
    for tried in choose_products(base, prepared.plan.heaviest_tokens(prepared.corpus.max_length), earlier=earlier):
        journal.experts_product[tried.shape] = tried.choice.as_json()
        for name, reason in tried.faults.items():
            voice.notice(
                "experts_product_left_out",
                f"the implementation {name} of the experts' product is not used on this GPU: {reason}",
                implementation=name,
                reason=reason,
            )
        voice.notice("experts_product", str(tried), milliseconds=tried.milliseconds)


def _find_checkpoint(shelf: CheckpointShelf, voice: EventWriter) -> Checkpoint | None:
    checkpoint, passed_over = shelf.newest()
    for damaged in passed_over:
        voice.notice("checkpoint_passed_over", f"the checkpoint {damaged.path.name} is not used: {damaged.reason}")
    if checkpoint is not None:
        voice.notice("resumed", f"training resumes from step {checkpoint.step}", step=checkpoint.step)
    return checkpoint


def _fingerprint(spec: JobSpec, plan: Plan, corpus: Corpus) -> dict[str, object]:
    """What must be equal for a checkpoint to be continued; otherwise two runs would be mixed without an error."""
    return {
        "base_model": spec.base_model,
        "model_revision": spec.model_revision,
        "hyperparameters": spec.hyperparameters.model_dump(mode="json"),
        "quantize": spec.quantize,
        "data": corpus.digest(),
        "total_steps": plan.total_steps,
        "torch": version("torch"),
        "transformers": version("transformers"),
        # Left out for bfloat16, which GPUs compute in, so that checkpoints of earlier versions can be continued.
        **({} if plan.compute_type == "bfloat16" else {"compute_type": plan.compute_type}),
    }
