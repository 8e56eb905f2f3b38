"""RunPod's serverless handler: one job per call, with or without a database. `python -m daemon.serverless`
runs it; it uses the same attempt as the service."""
