"""The dashboard: one page, fed by one shared reader of the database however many browsers watch. It can cancel and
retry jobs and take blind votes on comparisons, and nothing else. The gateway serves it."""
