"""RunPod's serverless handler: one job for each call, with a database's rows or without. `python -m daemon.serverless`
runs it; it uses the same attempt as the service."""
