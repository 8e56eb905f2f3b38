"""What `migrate` sets right after a restore: rows that were inserted while triggers were off."""
