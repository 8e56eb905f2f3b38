"""The training loop: steps, loss, checkpoints, memory. An interrupted run ends with the same adapter as an
uninterrupted one. Used by the recipe."""
