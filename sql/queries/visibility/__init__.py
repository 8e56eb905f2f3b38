"""Whether row security hides rows from us."""
