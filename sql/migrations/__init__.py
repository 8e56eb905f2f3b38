"""What `supabase db push` and `migrate` apply, in the order of the names. A file that was published is never
edited."""
