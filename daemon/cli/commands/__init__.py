"""The commands, one file per subject. Each imports what it needs when it runs, so that `--help` is quick.
`daemon.__main__` puts them together."""
