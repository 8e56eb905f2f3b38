-- Writes points for the app's charts. A step repeated after a resume replaces its point: job and step make the id.
-- `held` = 0 means that the lease is lost and nothing was written.
WITH held AS MATERIALIZED (
    SELECT lease.job_id
    -- include: own_lease
),
written AS (
    INSERT INTO metrics_points AS point
        (id, job_id, timestamp, epoch, step, training_loss, validation_loss, learning_rate, gradient_norm, throughput,
         gpu_utilization)
    SELECT
        md5(held.job_id || '/' || new.step)::uuid, held.job_id, coalesce(new.at, clock_timestamp()), new.epoch, new.step, new.training_loss,
        new.validation_loss, new.learning_rate, new.gradient_norm, new.throughput, new.gpu_utilization
    FROM held
    CROSS JOIN jsonb_to_recordset(%(points)s) AS new (
        at timestamptz, epoch integer, step integer, training_loss numeric, validation_loss numeric,
        learning_rate numeric, gradient_norm numeric, throughput numeric, gpu_utilization numeric
    )
    ON CONFLICT (id) DO UPDATE
    SET timestamp = excluded.timestamp,
        epoch = excluded.epoch,
        training_loss = excluded.training_loss,
        validation_loss = coalesce(excluded.validation_loss, point.validation_loss),
        learning_rate = excluded.learning_rate,
        gradient_norm = excluded.gradient_norm,
        throughput = excluded.throughput,
        gpu_utilization = excluded.gpu_utilization
    RETURNING 1
)
SELECT (SELECT count(*) FROM held) AS held, (SELECT count(*) FROM written) AS written
