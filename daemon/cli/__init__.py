"""The words of the command line, one file a group; `daemon.__main__` puts them together."""
