-- Inserts the dataset of a file that was just stored. Always one row.
INSERT INTO public.datasets
    (id, user_id, name, description, storage_bucket, storage_path, file_name, file_size, total_training_pairs,
     status, training_ready, validated_at)
VALUES (
    %(id)s, %(user_id)s, %(name)s, 'Submitted from the command line', %(bucket)s, %(path)s, %(file_name)s,
    %(file_size)s, %(answers)s, 'ready', true, clock_timestamp()
)
RETURNING id
