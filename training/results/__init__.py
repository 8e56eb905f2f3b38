"""What a run leaves beside its adapter: history, summary, chart, trackers."""
