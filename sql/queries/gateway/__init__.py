"""What a caller over HTTP or at the command line brings in, and the service's numbers."""
