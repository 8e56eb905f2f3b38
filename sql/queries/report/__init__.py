"""What an attempt tells while it runs (plan, progress, points, events), and the outbox of callbacks."""
