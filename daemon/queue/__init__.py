"""The jobs table as a state machine: its states, one method for each statement, leases, reaping, this host's row.
Every write to a claimed job names its lease, so that nobody can write to a job that is not his any more. The worker and
the attempt move jobs through it; nobody else writes a state."""
