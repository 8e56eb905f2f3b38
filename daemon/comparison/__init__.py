"""What a comparison of adapters found: answers side by side, losses on held-out conversations, votes and their count.
The command `compare` makes it, the dashboard shows it."""
