"""What people look up: one statement to a file, all of them reads, under the reader's own rights."""
