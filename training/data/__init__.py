"""From a dataset file to micro-batches: formats, conversations, chat template, loss mask, order. A bad line is
reported with its number and reason. Used by preflight and the loop."""
