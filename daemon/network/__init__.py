"""Requests to addresses that tenants wrote. None of them reaches a private address, and no credential leaves for a host
that was not configured. Downloads, callbacks and the hub go through here."""
