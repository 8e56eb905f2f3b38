"""The command line: the commands, the data they read and write, and the view of watched jobs. It changes jobs only
through the functions that apps use too. Called by `daemon.__main__` only."""
