"""The tables as the migrations make them: applied, verified against the catalogue, repaired after a restore. It refuses
an app's schema that it could not serve before the first change. Called by `migrate`, doctor and the demo."""
