"""What a comparison of adapters found: answers side by side, and losses on held-out conversations. The command
`compare` makes it."""
