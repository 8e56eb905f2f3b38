"""Several processes for one job, one on each GPU, started by torchrun's engine."""
