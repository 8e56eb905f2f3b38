"""`make demo`: a Postgres, a daemon and a real small model on one machine, and a row inserted to start it all."""
