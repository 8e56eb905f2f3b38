"""What a run saves beside its adapter: model card, history, summary, chart, trackers. A resumed run continues them.
Used by the recipe, the adapter's room and the loop."""
