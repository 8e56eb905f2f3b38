"""Makes requests to URLs that tenants wrote. None of them reaches a private address, and no credential is sent to a
host that was not configured. Downloads, callbacks and the hub client use it."""
