-- Included by every statement that ends an attempt: only the lease's holder can end it. Each adds what it returns.
DELETE FROM training_leases AS lease
WHERE lease.job_id = %(job_id)s
  AND (lease.epoch, lease.token) = (%(epoch)s, %(token)s)
