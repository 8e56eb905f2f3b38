"""The command line: the commands, the data they read and write, and the view of watched jobs."""
