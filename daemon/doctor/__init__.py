"""Checks whether this host can work and says for each fault what to do. Each check does what the daemon will do. The
`doctor` command calls it."""
