"""The training loop: steps, loss, checkpoints, memory. A run that was interrupted ends with the adapter of one that was
not. The recipe calls it."""
