"""Who may ask and how often: keys, sessions, rate limits. Every route is behind it."""
