"""Where datasets are read and adapters are kept: a folder, or Supabase Storage by resumable uploads. Every object is
recorded before its first byte is sent, so that none is left behind unaccounted for. Called by the attempt."""
