"""What a run saves beside its adapter: history, summary, chart, trackers. A resumed run continues them. Used by the
recipe and the loop."""
