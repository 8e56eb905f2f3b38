"""The daemon: claims rows of training_jobs, runs the trainer, reports progress, uploads the adapter, ends the job."""
