-- Included by every statement that ends an attempt: only who holds the lease ends it. Each says what it returns.
DELETE FROM training_leases AS lease
WHERE lease.job_id = %(job_id)s
  AND (lease.epoch, lease.token) = (%(epoch)s, %(token)s)
