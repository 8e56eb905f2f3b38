-- Reads where a job's dataset is. No row means that it is hidden from us: a dataset that a job uses cannot be deleted.
SELECT dataset.storage_bucket, dataset.storage_path, dataset.user_id AS dataset_user_id
FROM datasets AS dataset
WHERE dataset.id = %(dataset_id)s
