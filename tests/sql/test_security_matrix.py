"""Who may do what, column by column: the table below is compared with what Postgres allows when it is tried.

`python -m pytest tests/sql/test_security_matrix.py -s` prints what was found.

    r    reads the column                         .   refused, or the row is not seen
    i    a new row keeps the value that was sent  (i) a new row is taken, with the database's own value in its place
    u    an update changes the value              (u) an update is taken and changes nothing
    d    deletes the row                          (d) may, but a foreign key keeps the row
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from daemon.queue.sql_job_store import SqlJobStore
from daemon.schema.migrations import migrate
from tests.postgres import AppDatabase, Server
from tests.sql.security_matrix import CALLERS, Prober, Target, World, heading, row, table_lines
from tests.sql.world import Jobs, orphan, populate

LATER = datetime(2030, 1, 1, tzinfo=UTC)

TABLES = """
  anon     other    own      service  daemon

datasets
  .        .        d        d        .        (the row)
  .        .        riu      riu      ri       id, name, description, format, status, storage_bucket,
                                               storage_path, file_name, file_size, total_training_pairs,
                                               total_validation_pairs, total_tokens,
                                               avg_turns_per_conversation, avg_tokens_per_turn,
                                               training_ready, validated_at, validation_errors, sample_data,
                                               created_at, updated_at, deleted_at, error_message
  .        .        ri       riu      ri       user_id

training_jobs (queued)
  .        .        .        d        .        (the row)
  .        .        ri       ri       ri       id, user_id, client_job_id
  .        .        ri       riu      ri       dataset_id, preset_id, hyperparameters, gpu_config,
                                               dataset_url, max_cost, deadline_at
  .        .        ru       ru       ru       status
  .        .        r(i)     r(i)     r(i)u    current_stage, progress, current_epoch, current_step,
                                               current_metrics, queued_at, started_at, completed_at,
                                               estimated_completion_at, current_cost, final_cost,
                                               error_message, error_stack, retry_count, due, held, need_gpus,
                                               need_gpu_memory_gb, need_gpu_type, base_model, attempt,
                                               last_progress_at, error_code, error_hint, adapter_path,
                                               adapter_sha256, adapter_bytes, result, trained_with,
                                               deployed_at, deployed_as, deployment_note
  .        .        ri       riu      riu      total_epochs, total_steps, estimated_total_cost, callback_url,
                                               run_after
  .        .        r(i)     r(i)     r(i)     external_job_id, created_at, lease_epoch, lease_token
  .        .        r(i)     r(i)u    r(i)     artifact_id, updated_at
  .        .        r(i)     riu      ri       priority, max_attempts

training_jobs (running)
  .        .        .        d        .        (the row)
  .        .        r        r        r        id, user_id, dataset_id, preset_id, hyperparameters,
                                               gpu_config, external_job_id, created_at, dataset_url,
                                               client_job_id, priority, due, lease_epoch, lease_token
  .        .        ru       ru       ru       status
  .        .        r        r        ru       current_stage, progress, current_epoch, current_step,
                                               current_metrics, queued_at, started_at, completed_at,
                                               estimated_completion_at, current_cost, final_cost,
                                               error_message, error_stack, retry_count, run_after, held,
                                               need_gpus, need_gpu_memory_gb, need_gpu_type, base_model,
                                               attempt, last_progress_at, error_code, error_hint,
                                               adapter_path, adapter_sha256, adapter_bytes, result,
                                               trained_with, deployed_at, deployed_as, deployment_note
  .        .        r        ru       ru       total_epochs, total_steps, estimated_total_cost, callback_url
  .        .        r        ru       r        artifact_id, updated_at, max_attempts, max_cost, deadline_at

training_jobs (completed)
  .        .        .        (d)      .        (the row)
  .        .        r        r        r        id, user_id, dataset_id, preset_id, hyperparameters,
                                               gpu_config, status, external_job_id, created_at, dataset_url,
                                               client_job_id, priority, due, lease_epoch, lease_token
  .        .        r        r        ru       current_stage, progress, current_epoch, current_step,
                                               current_metrics, queued_at, started_at, completed_at,
                                               estimated_completion_at, current_cost, final_cost,
                                               error_message, error_stack, retry_count, run_after, held,
                                               need_gpus, need_gpu_memory_gb, need_gpu_type, base_model,
                                               attempt, last_progress_at, error_code, error_hint,
                                               adapter_path, adapter_sha256, adapter_bytes, result,
                                               trained_with, deployed_at, deployed_as, deployment_note
  .        .        r        ru       ru       total_epochs, total_steps, estimated_total_cost, callback_url
  .        .        r        ru       r        artifact_id, updated_at, max_attempts, max_cost, deadline_at

training_jobs (cancelled)
  .        .        .        d        .        (the row)
  .        .        r        r        r        id, user_id, dataset_id, preset_id, hyperparameters,
                                               gpu_config, external_job_id, created_at, dataset_url,
                                               client_job_id, priority, due, lease_epoch, lease_token
  .        .        r(u)     r(u)     r(u)     status
  .        .        r        r(u)     ru       current_stage
  .        .        r        r        ru       progress, current_epoch, current_step, current_metrics,
                                               queued_at, started_at, estimated_completion_at, current_cost,
                                               error_message, error_stack, retry_count, run_after, held,
                                               need_gpus, need_gpu_memory_gb, need_gpu_type, base_model,
                                               attempt, last_progress_at, error_code, error_hint,
                                               adapter_path, adapter_sha256, adapter_bytes, result,
                                               trained_with, deployed_at, deployed_as, deployment_note
  .        .        r        ru       ru       total_epochs, total_steps, estimated_total_cost, callback_url
  .        .        r(u)     r(u)     ru       completed_at, final_cost
  .        .        r        ru       r        artifact_id, updated_at, max_attempts, max_cost, deadline_at

metrics_points
  .        .        .        d        d        (the row)
  .        .        r        riu      riu      id, job_id, timestamp, epoch, step, training_loss,
                                               validation_loss, learning_rate, gradient_norm, throughput,
                                               gpu_utilization

model_artifacts
  .        .        (d)      (d)      .        (the row)
  .        .        r        ri(u)    ri       id
  .        .        r        riu      ri       user_id, job_id, dataset_id, parent_model_id, created_at
  .        .        ru       riu      riu      name, status, deployed_at, updated_at
  .        .        ru       riu      ri       version, description, deleted_at
  .        .        r        riu      riu      quality_metrics, training_summary, configuration, artifacts

cost_records
  .        .        .        d        .        (the row)
  .        .        r        riu      ri       id, user_id, job_id, cost_type, billing_period, recorded_at
  .        .        r        riu      riu      amount, details

notifications
  .        .        d        d        .        (the row)
  .        .        ri       riu      ri       id, user_id, type, title, message, priority, action_url,
                                               metadata, created_at
  .        .        riu      riu      ri       read

training_leases
  .        .        .        .        .        (the row)
  .        .        r        r        riu      job_id, user_id, claimed_at, heartbeat_at, expires_at
  .        .        .        r        riu      epoch, worker_id, user_slot, token

training_events
  .        .        .        .        d        (the row)
  .        .        r        r        r        id
  .        .        r        r        ri       job_id, epoch, at, kind, message, data

training_workers
  .        .        .        .        .        (the row)
  .        r        r        r        riu      id, device, gpu_count, gpu_memory_gb, gpu_type, models, slots,
                                               user_cap, busy, state, last_seen_at
  .        .        .        r        riu      host, pod, gpus, drain, versions, data, started_at

training_callbacks
  .        .        .        .        d        (the row)
  .        .        r        r        riu      id, sequence, job_id, user_id, event, state, attempts,
                                               created_at, next_at, last_status, delivered_at
  .        .        .        r        riu      url, host, payload, locked_until, lock_token, last_error

training_deliveries
  .        .        .        .        .        (the row)
  .        .        r        r        riu      id, job_id, user_id, kind, target, state, attempts, next_at,
                                               locked_until, result, error_code, error_message, error_hint,
                                               created_at, started_at, finished_at
  .        .        .        r        riu      storage, first_worker, worker_id, claims, lock_token

training_pods
  .        .        .        .        .        (the row)
  .        .        .        r        riu      id, slot, gpu_type, gpu_count, pod, price_per_hour, asked_at,
                                               reported_at, idle_since, doomed_at, doom, ended_at, ending

training_uploads
  .        .        .        .        d        (the row)
  .        .        .        r        riu      job_id, epoch, kind, step, storage, bucket, objects,
                                               manifest_sha256, bytes, noted_at

training_served_names
  .        .        .        .        .        (the row)
  .        .        .        r        riu      endpoint, name, user_id, job_id, completed_at, superseded,
                                               taken_at

training_fleet_decisions
  .        .        .        .        .        (the row)
  .        .        .        r        r        id
  .        .        .        r        ri       at, decision, pod_row, pod, gpu_type, reason

training_comparisons
  .        .        .        d        .        (the row)
  .        .        r        r        ri       id, user_id, base_model, contestants, options, held_out, notes,
                                               prompts_are_held_out, created_at

training_comparison_answers
  .        .        .        .        .        (the row)
  .        .        r        r        ri       comparison_id, number, turns, reference, answers

training_votes
  .        .        .        .        .        (the row)
  .        .        r        r        ri       comparison_id, number, one, two, kind, voter, voter_key,
                                               turned, said, shown_at
  .        .        r        r        riu      choice, voted_at
"""

# x carried out, - refused by the function's own check (as for a job that does not exist), . may not be called.
FUNCTIONS = """
  anon     other    own      service  daemon
  .        x        x        x        x        submit_training_job
  .        -        x        x        x        training_job_status
  .        -        x        x        x        cancel_training_job
  .        -        x        x        x        retry_training_job
  .        -        x        x        x        resend_callback
  .        -        x        x        x        redeliver
  .        .        .        x        x        reap_expired_leases
  .        .        .        x        x        release_held_jobs
  .        .        .        x        x        prune_training_history
  .        x        x        x        x        training_status_json
  .        x        x        x        x        training_deliveries_of
  .        x        x        x        x        training_name_url
  .        x        x        x        x        training_read_needs
  .        x        x        x        x        training_check_limits
  .        .        .        .        x        training_require_owner
  .        .        .        .        x        training_hiding_policies
  .        .        .        .        x        training_find_job
  .        .        .        .        x        training_real_job
  .        .        .        .        x        training_sample_rows
  .        .        .        .        x        training_make_deliveries
  .        .        .        .        x        training_record_cost
  .        .        .        .        x        training_notify_user
  .        x        x        .        x        training_owns_file
  .        .        .        x        x        training_note_dispatcher
  .        .        .        .        x        training_find_dispatchers
  .        .        .        .        x        training_held_seconds
  .        x        x        .        x        training_is_object_path
"""

A_FAILED_JOB = "(SELECT job FROM training_jobs AS job WHERE id = %(failed)s)"

CALLS = {
    "submit_training_job": "submit_training_job(jsonb_build_object('user_id', %(owner)s::uuid, 'dataset_url', 'https://a'))",
    "training_job_status": "training_job_status(%(running)s)",
    "cancel_training_job": "cancel_training_job(%(running)s)",
    "retry_training_job": "retry_training_job(%(failed)s)",
    "resend_callback": "resend_callback(%(dead_callback)s)",
    "redeliver": "redeliver(%(completed)s, 'merged')",
    "reap_expired_leases": "reap_expired_leases()",
    "release_held_jobs": "release_held_jobs()",
    "prune_training_history": "prune_training_history('1 year')",
    "training_status_json": "training_status_json(NULL::training_jobs)",
    "training_deliveries_of": "training_deliveries_of(%(completed)s)",
    "training_name_url": "training_name_url('https://a')",
    "training_read_needs": "training_read_needs('{}', '{}')",
    "training_check_limits": "training_check_limits(3, 1, now(), NULL)",
    "training_require_owner": "training_require_owner(%(owner)s)",
    "training_hiding_policies": "training_hiding_policies()",
    "training_find_job": "training_find_job(%(running)s)",
    "training_real_job": "training_real_job(%(running)s)",
    "training_sample_rows": "training_sample_rows()",
    "training_make_deliveries": 'training_make_deliveries(%(completed)s, %(owner)s, 1, NULL, \'[{"kind": "gguf"}]\')',
    "training_record_cost": f"training_record_cost({A_FAILED_JOB}, 1)",
    "training_notify_user": f"training_notify_user({A_FAILED_JOB}, 'failed')",
    "training_owns_file": "training_owns_file(%(owner)s, 'x')",
    "training_note_dispatcher": "training_note_dispatcher(%(running)s, 'job_started')",
    "training_find_dispatchers": "training_find_dispatchers()",
    "training_held_seconds": f"training_held_seconds({A_FAILED_JOB})",
    "training_is_object_path": "training_is_object_path('x')",
}

# The rows that each sees of a view with rows of two users.
VIEWS = """
  anon     other    own      service  daemon
  .        own      own      all      all      training_job_status
  .        own      own      all      all      training_queue
  .        own      own      all      all      training_orphans
  .        own      own      all      all      training_throughput
  .        all      all      all      all      training_live_workers
  .        .        .        all      all      training_worker_status
"""

# What is counted: throughput has a row a day, not a row a job.
SOURCES = {
    "training_job_status": "training_job_status",
    "training_queue": "training_queue",
    "training_orphans": "training_orphans",
    "training_throughput": "(SELECT generate_series(1, completed) FROM training_throughput) AS one_a_job",
    "training_live_workers": "training_live_workers",
    "training_worker_status": "training_worker_status",
}


async def build(store: SqlJobStore, database: AppDatabase) -> tuple[World, Jobs]:
    """Two users with a row of every kind; the first is the owner whose rows are tried."""
    owner, stranger = database.insert_user(), database.insert_user()
    jobs = await populate(store, database, owner)
    await populate(store, database, stranger)
    for user in (owner, stranger):
        orphan(database, user)
    dataset = database.job(jobs.scheduled)["dataset_id"]
    database.run(
        "INSERT INTO training_pods (slot, gpu_type, asked_at, ended_at, ending, gpu_count) "
        "VALUES (1, 'H100', now(), now(), 'ended', 1), (2, 'H100', now(), now(), 'ended', 1)"
    )
    database.run(
        "INSERT INTO training_fleet_decisions (at, decision, reason) VALUES (now(), 'wait', 'a'), (now(), 'wait', 'b')"
    )
    database.run(
        "INSERT INTO training_uploads (job_id, epoch, kind, storage, bucket, objects) "
        "VALUES (%s, 1, 'adapter', 'folder x', 'lora-models', '{a}')",
        (jobs.running,),
    )

    database.run(
        "INSERT INTO training_served_names (endpoint, name, user_id, job_id, completed_at) "
        "VALUES ('e', 'n', %s, %s, now())",
        (owner, jobs.completed),
    )

    def one_id(statement: str, *values: Any) -> Any:
        return database.one(statement, values)["id"]

    compared = one_id(
        "INSERT INTO training_comparisons "
        "(user_id, base_model, contestants, options, held_out, notes, prompts_are_held_out) "
        """VALUES (%s, 'a/b', '["base", "one"]', '{}', '[]', '[]', true) RETURNING id""",
        owner,
    )
    database.run(
        "INSERT INTO training_comparison_answers (comparison_id, number, turns, answers) "
        "VALUES (%(id)s, 1, '[]', '[]'), (%(id)s, 2, '[]', '[]')",
        {"id": compared},
    )
    database.run(
        "INSERT INTO training_votes (comparison_id, number, one, two, kind, voter, turned, choice, voted_at) "
        "VALUES (%s, 1, 0, 9, 'person', 'me', false, 'one', now())",
        (compared,),
    )

    of_owner = "SELECT id FROM {} WHERE user_id = %s LIMIT 1"
    artifact = one_id(of_owner.format("model_artifacts"), owner)
    shown: dict[str, Any] = {"quality_metrics": {}, "training_summary": {}, "configuration": {}, "artifacts": {}}
    targets = (
        Target("datasets", "datasets", {"id": database.insert_dataset(owner)},
               {"user_id": owner, "storage_path": f"{owner}/fresh.jsonl", "name": "fresh", "file_name": "fresh",
                "file_size": 1}),
        Target("training_jobs (queued)", "training_jobs", {"id": jobs.scheduled},
               {"user_id": owner, "dataset_id": dataset, "run_after": LATER}),
        Target("training_jobs (running)", "training_jobs", {"id": jobs.running}),
        Target("training_jobs (completed)", "training_jobs", {"id": jobs.completed}),
        Target("training_jobs (cancelled)", "training_jobs", {"id": jobs.cancelled}),
        Target("metrics_points", "metrics_points",
               {"id": one_id("SELECT id FROM metrics_points WHERE job_id = %s LIMIT 1", jobs.running)},
               {"job_id": jobs.running, "epoch": 1, "step": 99, "training_loss": 1, "learning_rate": 0}),
        Target("model_artifacts", "model_artifacts", {"id": artifact},
               {"user_id": owner, "job_id": jobs.failed, "dataset_id": dataset, "name": "fresh"} | shown),
        Target("cost_records", "cost_records", {"id": one_id(of_owner.format("cost_records"), owner)},
               {"user_id": owner, "cost_type": "other", "amount": 1, "billing_period": LATER.date()}),
        Target("notifications", "notifications", {"id": one_id(of_owner.format("notifications"), owner)},
               {"user_id": owner, "type": "job_started", "title": "t", "message": "m"}),
        Target("training_leases", "training_leases", {"job_id": jobs.running},
               {"job_id": jobs.scheduled, "epoch": 1, "worker_id": uuid4(), "user_id": owner,
                "expires_at": database.job(jobs.scheduled)["run_after"]}),
        Target("training_events", "training_events",
               {"id": one_id("SELECT id FROM training_events WHERE job_id = %s LIMIT 1", jobs.running)},
               {"job_id": jobs.running, "kind": "notice"}),
        Target("training_workers", "training_workers", {"id": one_id("SELECT id FROM training_workers LIMIT 1")},
               {"id": uuid4(), "host": "h", "device": "cpu"}),
        Target("training_callbacks", "training_callbacks",
               {"id": one_id("SELECT id FROM training_callbacks WHERE job_id = %s LIMIT 1", jobs.completed)},
               {"job_id": jobs.completed, "user_id": owner, "url": "https://a", "host": "a", "event": "e",
                "payload": {}}),
        Target("training_deliveries", "training_deliveries",
               {"id": one_id("SELECT id FROM training_deliveries WHERE job_id = %s", jobs.completed)},
               {"job_id": jobs.failed, "user_id": owner, "kind": "merged"}),
        Target("training_pods", "training_pods", {"id": one_id("SELECT id FROM training_pods WHERE slot = 1")},
               {"slot": 3, "gpu_type": "H100", "gpu_count": 1, "asked_at": LATER,
                "ended_at": LATER, "ending": "ended"}),
        Target("training_uploads", "training_uploads", {"job_id": jobs.running},
               {"job_id": jobs.failed, "epoch": 1, "kind": "adapter", "storage": "s", "bucket": "lora-models",
                "objects": ["a"]}),
        Target("training_served_names", "training_served_names", {"job_id": jobs.completed},
               {"endpoint": "e", "name": "other", "user_id": owner, "job_id": jobs.failed, "completed_at": LATER}),
        Target("training_fleet_decisions", "training_fleet_decisions",
               {"id": one_id("SELECT id FROM training_fleet_decisions LIMIT 1")},
               {"at": LATER, "decision": "wait", "reason": "r"}),
        Target("training_comparisons", "training_comparisons", {"id": compared},
               {"user_id": owner, "base_model": "a/b", "contestants": Jsonb([1, 2]), "options": {},
                "held_out": Jsonb([]), "notes": Jsonb([]), "prompts_are_held_out": True}),
        Target("training_comparison_answers", "training_comparison_answers", {"comparison_id": compared, "number": 1},
               {"comparison_id": compared, "number": 3, "turns": Jsonb([]), "answers": Jsonb([])}),
        Target("training_votes", "training_votes", {"comparison_id": compared, "number": 1},
               {"comparison_id": compared, "number": 2, "one": 0, "two": 9, "kind": "person", "voter": "me",
                "turned": False, "choice": "one", "voted_at": LATER}),
    )  # fmt: skip
    other_values = {
        "user_id": stranger,
        "training_ready": False,
        "job_id": jobs.failed,
        "training_leases.job_id": jobs.failed,
        "dataset_id": database.insert_dataset(owner),
        "artifact_id": one_id(of_owner.format("model_artifacts"), stranger),
        "parent_model_id": artifact,
        "training_jobs.status": "cancelled",
        "storage_bucket": "training-files",
        "storage_path": f"{owner}/tried.jsonl",
        "training_workers.state": "draining",
        "training_callbacks.state": "dead",
        "training_deliveries.kind": "gguf",
        "training_deliveries.state": "failed",
        "training_uploads.kind": "checkpoint",
        "superseded": [jobs.failed],
        "sequence": 9_999,
        "pod_row": one_id("SELECT id FROM training_pods WHERE slot = 2"),
        "slot": 9,
        "comparison_id": compared,
        "training_votes.kind": "judge",
        "choice": "tie",
        "contestants": Jsonb([1, 2, 3]),
        "training_votes.number": 2,
        "one": 1,
    }
    return World(owner, stranger, targets, other_values), jobs


async def test_each_role_may_do_exactly_what_the_matrix_says(store: SqlJobStore, database: AppDatabase) -> None:
    world, jobs = await build(store, database)
    with psycopg.connect(database.dsn, row_factory=dict_row) as connection:
        prober = Prober(connection, world)
        tables = [heading(), *table_lines(connection, world)]
        functions, views = [heading()], [heading()]
        for name, call in CALLS.items():
            functions += row([prober.calls(caller, call, asdict(jobs)) for caller in CALLERS], name)
        for name, source in SOURCES.items():
            views += row([prober.sees(caller, source) for caller in CALLERS], name)
        connection.rollback()
    for found in (tables, functions, views):
        print("\n" + "\n".join(found))
    assert tables == TABLES.strip("\n").split("\n")
    assert functions == FUNCTIONS.strip("\n").split("\n")
    assert views == VIEWS.strip("\n").split("\n")


def test_nothing_in_the_schema_is_left_out_of_the_matrix(database: AppDatabase) -> None:
    def named(statement: str) -> set[str]:
        return {row["name"] for row in database.run(statement)}

    in_public = "FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind"
    assert named(f"SELECT relname AS name {in_public} IN ('r', 'p')") == {
        text.split(" ")[0] for text in TABLES.strip("\n").split("\n") if text and not text.startswith(" ")
    }
    assert named(f"SELECT relname AS name {in_public} IN ('v', 'm')") == set(SOURCES)
    # A trigger's function cannot be called; all others are.
    callable_ones = "FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prorettype <> 'trigger'::regtype"
    assert named(f"SELECT proname AS name {callable_ones}") == set(CALLS)


# What each role holds, by the catalog: every privilege on every column, sequence and function.
PRIVILEGES = """
    SELECT role, relation.relname::text AS thing, attribute.attname::text AS part, privilege
    FROM unnest(ARRAY['anon', 'authenticated', 'service_role', 'training_daemon']) AS role
    CROSS JOIN pg_class AS relation
    JOIN pg_attribute AS attribute ON attribute.attrelid = relation.oid AND attnum > 0 AND NOT attisdropped
    CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE']) AS privilege
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
      AND has_column_privilege(role, relation.oid, attribute.attnum, privilege)
    UNION ALL
    SELECT role, relname, '', privilege
    FROM unnest(ARRAY['anon', 'authenticated', 'training_daemon']) AS role
    CROSS JOIN pg_class
    CROSS JOIN unnest(ARRAY['DELETE', 'TRUNCATE', 'TRIGGER', 'REFERENCES']) AS privilege
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
      AND has_table_privilege(role, oid, privilege)
    UNION ALL
    SELECT role, relname, '', privilege
    FROM unnest(ARRAY['anon', 'authenticated', 'service_role', 'training_daemon']) AS role
    CROSS JOIN pg_class
    CROSS JOIN unnest(ARRAY['USAGE', 'SELECT', 'UPDATE']) AS privilege
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'S'
      AND has_sequence_privilege(role, oid, privilege)
    UNION ALL
    SELECT role, oid::regprocedure::text, '', 'EXECUTE'
    FROM unnest(ARRAY['anon', 'authenticated', 'service_role', 'training_daemon']) AS role
    CROSS JOIN pg_proc
    WHERE pronamespace = 'public'::regnamespace AND proname <> 'update_updated_at_column'
      AND has_function_privilege(role, oid, 'EXECUTE')
"""


def test_an_older_project_that_granted_everything_to_everyone_ends_with_the_same_rights(
    postgres: Server, database: AppDatabase
) -> None:
    with postgres.database() as name, psycopg.connect(postgres.dsn(name), autocommit=True) as older:
        for kind in ("TABLES", "SEQUENCES", "FUNCTIONS"):
            older.execute(
                f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON {kind} "
                "TO anon, authenticated, service_role".encode()
            )
        migrate(postgres.dsn(name), local=True)
        found = {tuple(row) for row in older.execute(PRIVILEGES.encode()).fetchall()}
    expected = {tuple(row.values()) for row in database.run(PRIVILEGES)}
    assert found - expected == set()
    assert expected - found == set()


def test_a_user_cannot_have_somebody_elses_adapter_signed_for_him(database: AppDatabase) -> None:
    """The app signs the paths of model_artifacts.artifacts with its own key: a user must never write one."""
    owner, thief = database.insert_user(), database.insert_user()
    job_id = database.insert_job(thief)
    victims = f"adapters/{database.insert_job(owner)}.tar.gz"
    database.run(
        "INSERT INTO model_artifacts (user_id, job_id, dataset_id, name, quality_metrics, training_summary, "
        "configuration, artifacts) SELECT user_id, id, dataset_id, 'mine', '{}', '{}', '{}', '{}' "
        "FROM training_jobs WHERE id = %s",
        (job_id,),
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting("authenticated", thief) as caller:
        caller.execute("UPDATE model_artifacts SET artifacts = jsonb_build_object('adapter', %s::text)", (victims,))
    with database.acting("authenticated", thief) as caller:
        assert caller.execute("UPDATE model_artifacts SET name = 'better name'").rowcount == 1


async def test_a_stolen_daemon_password_gives_nobodys_job_away(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    jobs = await populate(store, database, user)
    for change in (
        "user_id = gen_random_uuid()",
        "max_cost = 1e6",
        "hyperparameters = '{}'",
        "dataset_url = 'https://a'",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting("training_daemon") as daemon:
            daemon.execute(f"UPDATE training_jobs SET {change} WHERE id = %s".encode(), (jobs.running,))
