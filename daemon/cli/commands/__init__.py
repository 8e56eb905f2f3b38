"""The commands, one file for each subject. `daemon.__main__` puts them together."""
