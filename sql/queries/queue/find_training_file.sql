-- Reads whether a path in the bucket training-files belongs to this user, by the function that the guard of datasets
-- asks as well. Always one row.
SELECT training_owns_file(%(user_id)s, %(path)s) AS is_own
