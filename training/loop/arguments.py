"""The library's settings for a job. Everything else keeps its default, and each choice has its reason."""

from __future__ import annotations

from trl import SFTConfig

from training.data.plan import MAX_GRAD_NORM, OPTIMIZER, SCHEDULE, Plan
from training.spec import JobSpec


def training_arguments(spec: JobSpec, plan: Plan, *, packed: bool) -> SFTConfig:
    chosen = spec.hyperparameters
    on_gpu = spec.device == "cuda"
    return SFTConfig(
        output_dir=str(spec.work_dir / "trainer"),
        # A whole step; the trainer splits it by tokens.
        per_device_train_batch_size=plan.share,
        gradient_accumulation_steps=1,
        num_train_epochs=plan.epochs,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=SCHEDULE,
        warmup_steps=plan.warmup_steps,
        weight_decay=chosen.weight_decay,
        max_grad_norm=MAX_GRAD_NORM,
        optim=OPTIMIZER,
        # Only what the library rounds by itself: autocast does not reach the loss, which calls the model inside the one
        # that accelerate wraps. Products have the types of their weights, in training as in evaluation and samples.
        bf16=plan.compute_type == "bfloat16",
        use_cpu=not on_gpu,
        # Recomputing activations trades time for memory; only a GPU is short of memory.
        gradient_checkpointing=on_gpu,
        activation_checkpointing_kwargs={"use_reentrant": False},
        # The data are already tokenised, labelled and cut to length.
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        padding_free=packed,
        pad_to_multiple_of=8 if on_gpu and not packed else None,
        router_aux_loss_coef=0.0,
        # The default would log a loss of 0.0 for NaN, and the job would "succeed".
        logging_nan_inf_filter=False,
        logging_steps=1,
        logging_first_step=True,
        # ProgressCallback decides when to evaluate and save: on a timer, after epochs, on a stop request.
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        seed=chosen.seed,
        data_seed=chosen.seed,
    )
