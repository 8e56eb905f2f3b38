"""Facts about what lies on disk and what memory is free, without torch: safe to import anywhere in the
trainer, and in the daemon: the third part of the bridge between them, beside spec and events."""
