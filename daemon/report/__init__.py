"""From a trainer's events to rows, and from rows to signed callbacks. The row comes first. The final state is never
dropped; progress may be. Each attempt owns a reporter, the service one courier."""
