"""From a dataset file to conversations: bytes to text, text to rows, rows to turns; every unusable line is named with
its reason. Used by the rest of `training.data` and by preflight."""
