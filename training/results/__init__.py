"""What a run saves beside its adapter: history, summary, chart, trackers."""
