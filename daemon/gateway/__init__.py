"""HTTP for callers that cannot insert a row: the older contract, the serverless API, metrics and the dashboard, all
over the same rows. `brightrun-trainer serve` runs it; nothing else imports it."""
