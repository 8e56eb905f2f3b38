"""The log of uploads: what may lie in Storage, and what of it nobody needs any more."""
