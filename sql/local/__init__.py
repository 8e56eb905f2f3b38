"""What Supabase brings and a plain Postgres lacks: roles, auth.users, auth.uid(). For tests and the demo."""
