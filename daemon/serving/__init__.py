"""Where finished adapters are served from: repositories on the hub, and an endpoint that answers with them. Called by
the deliveries, by the attempt (does the job fit the endpoint?) and by the command line."""
