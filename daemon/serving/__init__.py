"""Where finished adapters are served from: repositories on the hub. Called by the command line."""
