"""Several processes for one job, one on each GPU, started by torchrun's engine. If one dies, all end and the failed
one is named. Called by `training.__main__`."""
