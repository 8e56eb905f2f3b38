"""Access to Postgres: connect, run one statement, listen. It reports clearly that Postgres is unavailable; the caller
decides how long to wait. It knows nothing about jobs, and every room above may call it."""
