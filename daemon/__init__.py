"""The daemon: claims rows of training_jobs, runs the trainer, reports, uploads, settles."""
