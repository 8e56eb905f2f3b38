"""Where datasets are read and adapters are kept: a folder, or Supabase Storage by resumable uploads. Every object is
recorded before its upload starts, so that orphaned objects can be found and deleted. Called by the attempt."""
