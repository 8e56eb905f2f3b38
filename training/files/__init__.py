"""Facts about what lies on disk and what memory is free, without torch: safe to import anywhere in the trainer."""
