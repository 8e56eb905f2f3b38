"""From a dataset file to micro-batches: formats, conversations, chat template, loss mask, order. A bad line is named
with its number and reason. Preflight and the loop call it."""
