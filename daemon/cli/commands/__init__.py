"""The commands, one file per subject. `daemon.__main__` puts them together."""
