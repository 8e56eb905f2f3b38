"""The dashboard: one page served by the gateway, fed by one shared reader of the database."""
