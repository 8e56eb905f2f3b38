"""How we reach Postgres: connect, run one statement, listen. It says clearly when Postgres is away, and
decides nothing: whoever calls it chooses how long to wait. Knows no jobs; every room above may call it."""
