"""Decides who may call and how often: keys, sessions, rate limits. Every route is behind it; the gateway calls it."""
