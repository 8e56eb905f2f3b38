"""Applies the migrations, verifies the tables against the catalogue and repairs them after a restore. It refuses an
app's schema that we could not serve before it changes anything. Called by `migrate`, doctor and the demo."""
