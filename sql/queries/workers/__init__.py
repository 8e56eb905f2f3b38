"""The row of each host: registered, touched, drained, ended."""
