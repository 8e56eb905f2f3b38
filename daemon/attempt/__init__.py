"""One attempt at a job, from the claimed row to its outcome: the steps, the limits, the work folder, the clean-up.
The lease is held from the first line to the last; each attempt ends in exactly one outcome. Only the worker (and the
serverless host) starts one."""
