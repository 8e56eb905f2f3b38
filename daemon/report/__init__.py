"""From a trainer's events to rows, and from rows to signed callbacks. The row comes first; an ending is never dropped,
progress may be. The attempt owns a reporter, the service one courier."""
