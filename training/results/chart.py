"""Draws a run's chart: loss and validation, learning rate, gradient norm and tokens a second, as one PNG."""

from __future__ import annotations

from pathlib import Path

from training.results.history import RunHistory


def draw_chart(journal: RunHistory, path: Path, title: str) -> None:
    """Writes the chart; a run without steps gives empty axes."""
    # Imported here, so that it does not delay training. And without pyplot, which is for screens.
    from matplotlib.figure import Figure

    steps = [record.step for record in journal.steps]
    figure = Figure(figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    (loss, rate), (norm, speed) = axes
    loss.plot(steps, [record.loss for record in journal.steps], label="training", linewidth=1.2)
    if journal.evaluations:
        loss.plot(
            [record.step for record in journal.evaluations],
            [record.validation_loss for record in journal.evaluations],
            "o-",
            label="validation",
        )
    if journal.best is not None:
        loss.axvline(journal.best.step, linestyle=":", color="grey", label=f"kept (step {journal.best.step})")
    if journal.steps or journal.evaluations:
        loss.legend()
    loss.set_title("loss (nats a token)")
    rate.plot(steps, [record.learning_rate for record in journal.steps])
    rate.set_title("learning rate")
    norm.plot(steps, [record.grad_norm or 0.0 for record in journal.steps])
    norm.set_title("gradient norm")
    speed.plot(steps, [record.tokens_per_second or 0.0 for record in journal.steps])
    speed.set_title("tokens a second")
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
