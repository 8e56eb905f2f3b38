"""Experiment trackers: a TensorBoard file among the artifacts, and Weights & Biases by transformers' own integration.

A tracker only records. Whatever happens to it (no network, a refused key, a full disk at its service), training goes
on, and a notice among the job's events says what is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import WandbCallback

from training.event_writer import EventWriter
from training.failures import in_brief
from training.results.history import RunHistory
from training.spec import JobSpec

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

# TensorBoard opens every file below its folder whose name contains `tfevents`.
TENSORBOARD_FILE = "training.tfevents"
# The longest wait for W&B: if its service is down, the GPU must not wait.
_WANDB_INIT_SECONDS = 30.0
_WANDB_FINISH_SECONDS = 60.0


def tracking_callbacks(spec: JobSpec, journal: RunHistory, voice: EventWriter) -> Iterator[TrainerCallback]:
    """Yields one callback for each tracker of the job. They run after the one that fills the run's history."""
    if "tensorboard" in spec.trackers:
        yield TensorBoardFile(journal, spec.work_dir)
    if "wandb" in spec.trackers:
        yield WandbRun(spec, voice)


def tracked_files(spec: JobSpec) -> tuple[Path, ...]:
    """Returns the trackers' files for the adapter's folder, once training is over."""
    path = spec.work_dir / TENSORBOARD_FILE
    return (path,) if path.exists() else ()


class TensorBoardFile(TrainerCallback):
    """Writes the run's history as a TensorBoard event file during the run: `tensorboard --logdir` on the host shows it
    live. A resumed run begins with the history it already has, so that its curves have no gap."""

    def __init__(self, journal: RunHistory, work_dir: Path) -> None:
        self._journal = journal
        self._folder = work_dir / "tensorboard"
        self._goal = work_dir / TENSORBOARD_FILE
        self._writer: SummaryWriter | None = None
        self._steps = self._evaluations = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero:
            from tensorboardX import SummaryWriter

            # A killed attempt leaves its file, and the history has everything that is in it.
            shutil.rmtree(self._folder, ignore_errors=True)
            self._writer = SummaryWriter(str(self._folder))
            self._catch_up()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self._catch_up()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if self._writer is None:
            return
        self._catch_up()
        self._writer.close()
        self._writer = None
        # TensorBoard's own file name contains the host name.
        (written,) = self._folder.iterdir()
        written.replace(self._goal)
        self._folder.rmdir()

    def _catch_up(self) -> None:
        """Writes what the history has gained since the last time."""
        writer = self._writer
        if writer is None:
            return
        for step in self._journal.steps[self._steps :]:
            for name, value in (
                ("train/loss", step.loss),
                ("train/learning_rate", step.learning_rate),
                ("train/grad_norm", step.grad_norm),
                ("train/tokens_per_second", step.tokens_per_second),
                ("train/tokens_seen", step.tokens_seen),
                ("train/epoch", step.epoch),
            ):
                if value is not None:
                    writer.add_scalar(name, value, step.step)
        for evaluation in self._journal.evaluations[self._evaluations :]:
            writer.add_scalar("validation/loss", evaluation.validation_loss, evaluation.step)
        self._steps, self._evaluations = len(self._journal.steps), len(self._journal.evaluations)


class WandbRun(WandbCallback):
    """The library's integration, limited to one run per job: a later attempt continues the earlier one's run.

    No code, no console output, no weights leave the host: only numbers and the configuration. The key is in this
    process's environment, where the daemon put it.
    """

    def __init__(self, spec: JobSpec, voice: EventWriter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spec = spec
        self._voice = voice

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        if self._wandb is None or not state.is_world_process_zero:
            return
        with _Tolerance(self):
            self._wandb.init(
                id=self._spec.job_id,
                name=f"{self._spec.base_model} {self._spec.job_id[:8]}",
                resume="allow",
                dir=str(self._spec.work_dir),
                settings=self._wandb.Settings(
                    init_timeout=_WANDB_INIT_SECONDS,
                    finish_timeout=_WANDB_FINISH_SECONDS,
                    console="off",
                    silent=True,
                    save_code=False,
                    disable_git=True,
                ),
            )
            super().setup(args, state, model, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        if not self._initialized:
            self.setup(args, state, model)
        if self._wandb is not None:
            with _Tolerance(self):
                super().on_log(args, state, control, model, logs, **kwargs)  # type: ignore[no-untyped-call]

    def on_train_end(self, *given: Any, **kwargs: Any) -> None:
        with _Tolerance(self):
            super().on_train_end(*given, **kwargs)
            if self._wandb is not None and self._wandb.run is not None:
                self._wandb.finish()

    def give_up(self, reason: str) -> None:
        """Stops tracking: the library's methods do nothing once this is None."""
        self._wandb = None  # type: ignore[assignment]
        self._voice.notice("tracker_lost", f"the run is no longer sent to Weights & Biases: {reason}", tracker="wandb")


class _Tolerance:
    """A context in which an error of W&B ends the tracking, not the training."""

    def __init__(self, run: WandbRun) -> None:
        self._run = run

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> bool:
        if error is None:
            return False
        import wandb

        if not isinstance(error, wandb.Error | OSError | TimeoutError):
            return False
        self._run.give_up(in_brief(error))
        return True
