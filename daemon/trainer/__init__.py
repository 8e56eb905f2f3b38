"""The child process that trains: its start, its environment without secrets, its log, and the pool of pre-started ones.
Only this room turns exit code, signal, last event and silence into one verdict. Called by the attempt."""
