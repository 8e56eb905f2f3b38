"""SQL shipped as package data: migrations, queries (one statement a file), stand-ins for a plain Postgres."""
