"""The parts of a merge: what the base has and where, what the adapter adds, how files are written, continued and
proven. Called by training/export alone."""
