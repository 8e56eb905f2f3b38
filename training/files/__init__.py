"""Facts about files on disk and free memory, without torch. Safe to import anywhere in the trainer and in the daemon:
part of the interface between them, with spec and events."""
