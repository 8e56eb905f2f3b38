"""The jobs table as a state machine: its states, one method per statement, leases, reaping, this host's row.
Every write to a claimed job names its lease, so that a host that lost the job cannot write to it. The worker and the
attempt move jobs through this room; no other code writes a state."""
