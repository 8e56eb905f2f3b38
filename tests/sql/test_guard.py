"""The guard: every role, every move, decided by the database alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from daemon.queue.sql_job_store import SqlJobStore
from daemon.queue.states import FINAL, HELD, MOVES, UNFINISHED, State
from tests.postgres import AppDatabase, Server, app_job, insert_statement
from tests.sql.world import orphan

ROLES = ("postgres", "service_role", "owner", "stranger", "anon", "training_daemon")
PT409 = "PT409"


@pytest.fixture(scope="module")
def shared(postgres: Server, migrated_template: str) -> Iterator[AppDatabase]:
    """One database for the whole table: each cell is rolled back."""
    with postgres.database(template=migrated_template) as name:
        app = AppDatabase(postgres.dsn(name))
        yield app
        app.close()


@pytest.fixture(scope="module")
def people(shared: AppDatabase) -> dict[str, UUID]:
    return {"owner": shared.insert_user(), "stranger": shared.insert_user()}


class Rollback(Exception):
    """Ends a cell's transaction without a trace."""


def move(
    shared: AppDatabase, people: dict[str, UUID], role: str, origin: State, change: str, *, epoch: int = 1
) -> tuple[int, str | None]:
    """One UPDATE by one role on a job put into a state by force: rows changed, and the SQLSTATE of a refusal."""
    database_role = "authenticated" if role in people else role
    try:
        connection = shared.session
        with connection.transaction():
            job = app_job(people["owner"], shared.insert_dataset(people["owner"]))
            row = connection.execute(*map_bytes(insert_statement("training_jobs", job))).fetchone()
            assert row is not None
            connection.execute("SET LOCAL session_replication_role = replica")
            connection.execute(
                "UPDATE training_jobs SET status = %s, lease_epoch = %s, attempt = least(%s, 1), current_cost = 4.25, "
                "due = (%s = 'queued') WHERE id = %s",
                (origin.value, epoch, epoch, origin.value, row["id"]),
            )
            connection.execute("SET LOCAL session_replication_role = origin")
            if role in people:
                claims = f'{{"sub": "{people[role]}", "role": "authenticated"}}'
                connection.execute("SELECT set_config('request.jwt.claims', %s, true)", (claims,))
            if role != "postgres":
                connection.execute("SELECT set_config('role', %s, true)", (database_role,))
            try:
                changed = connection.execute(
                    f"UPDATE training_jobs SET {change} WHERE id = %(id)s".encode(), {"id": row["id"]}
                ).rowcount
            except psycopg.Error as error:
                raise Rollback(0, error.sqlstate) from error
            raise Rollback(changed, None)
    except Rollback as end:
        changed, sqlstate = end.args
        return changed, sqlstate


def map_bytes(statement: tuple[str, dict[str, Any]]) -> tuple[bytes, dict[str, Any]]:
    return statement[0].encode(), statement[1]


def expected(role: str, origin: State, target: State) -> tuple[int, str | None]:
    """The table of DESIGN.md, said once more in Python."""
    if role == "anon":
        return 0, "42501"
    if role == "stranger":
        return 0, None  # another user's row does not exist for him
    if target is State.CANCELLED:
        if origin is State.CANCELLED:
            return 1, None
        return (1, None) if origin in UNFINISHED else (0, PT409)
    if role == "training_daemon":
        legal = any(origin in move.origins and move.target is target for move in MOVES)
        return (1, None) if legal or origin is target else (0, PT409)
    if origin is target:
        # A user has no policy for anything but a cancel.
        return (1, None) if role != "owner" else (0, "42501")
    return 0, PT409


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("origin", list(State))
def test_every_role_has_exactly_its_moves(
    shared: AppDatabase, people: dict[str, UUID], role: str, origin: State
) -> None:
    for target in State:
        change = f"status = '{target}'"
        if role == "training_daemon" and target is State.INITIALIZING and origin is not target:
            change += ", lease_epoch = lease_epoch + 1"
        assert move(shared, people, role, origin, change) == expected(role, origin, target), f"{origin} to {target}"


def test_the_daemons_table_of_moves_is_the_guards(shared: AppDatabase, people: dict[str, UUID]) -> None:
    admitted = set()
    for origin, target in itertools.permutations(State, 2):
        change = f"status = '{target}'" + (", lease_epoch = lease_epoch + 1" if target is State.INITIALIZING else "")
        if move(shared, people, "training_daemon", origin, change) == (1, None):
            admitted.add((origin, target))
    assert admitted == {(origin, a_move.target) for a_move in MOVES for origin in a_move.origins}


@pytest.mark.parametrize(
    ("origin", "change"),
    [
        (State.QUEUED, "status = 'initializing'"),
        (State.QUEUED, "status = 'initializing', lease_epoch = lease_epoch + 2"),
        (State.RUNNING, "status = 'completed', lease_epoch = lease_epoch + 1"),
        (State.RUNNING, "status = 'queued', lease_epoch = 0"),
        (State.FAILED, "status = 'queued', lease_epoch = lease_epoch - 1"),
        (State.RUNNING, "lease_epoch = lease_epoch + 1"),
        (State.COMPLETED, "lease_epoch = lease_epoch - 1"),
    ],
)
def test_the_epoch_rises_by_one_at_a_claim_and_never_else(
    shared: AppDatabase, people: dict[str, UUID], origin: State, change: str
) -> None:
    assert move(shared, people, "training_daemon", origin, change) == (0, PT409)


@pytest.mark.parametrize("role", ["postgres", "service_role", "training_daemon"])
@pytest.mark.parametrize("origin", [State.RUNNING, State.QUEUED, State.CANCELLED, State.COMPLETED])
def test_the_token_changes_at_a_claim_and_never_else(
    shared: AppDatabase, people: dict[str, UUID], role: str, origin: State
) -> None:
    token = "lease_token = gen_random_uuid()"
    assert move(shared, people, role, origin, token) == (0, PT409)
    if role == "training_daemon":
        for target in (State.QUEUED, State.COMPLETED, State.RUNNING):
            assert move(shared, people, role, State.INITIALIZING, f"status = '{target}', {token}") == (0, PT409)
        claim = f"status = 'initializing', lease_epoch = lease_epoch + 1, {token}"
        assert move(shared, people, role, State.QUEUED, claim) == (1, None)


@pytest.mark.parametrize("role", ["postgres", "service_role", "training_daemon"])
def test_a_job_is_never_without_a_state(shared: AppDatabase, people: dict[str, UUID], role: str) -> None:
    for origin in State:
        # Held, so that no other rule refuses it first.
        change = "status = NULL, held = true, due = false" if role == "training_daemon" else "status = NULL"
        assert move(shared, people, role, origin, change) == (0, PT409), origin


SERVER_OWNED = (
    "progress = 50", "current_stage = 'x'", "current_cost = 0", "lease_epoch = 9", "attempt = 0", "due = true",
    "lease_token = gen_random_uuid()", "trained_with = '{}'", "base_model = 'x'",
    "deployed_at = now()", "deployed_as = 'x'", "deployment_note = 'x'",
    "held = true", "error_message = 'x'", "adapter_path = 'x'", "queued_at = now()", "retry_count = 5",
    "external_job_id = 'x'", "need_gpus = 4", "result = '{}'", "last_progress_at = now()",
    "user_id = gen_random_uuid()",
)  # fmt: skip


@pytest.mark.parametrize("role", ["postgres", "service_role"])
@pytest.mark.parametrize("origin", [State.RUNNING, State.COMPLETED])
def test_server_owned_columns_are_the_trainers_alone(
    shared: AppDatabase, people: dict[str, UUID], role: str, origin: State
) -> None:
    for change in SERVER_OWNED:
        assert move(shared, people, role, origin, change) == (0, PT409), change


@pytest.mark.parametrize("change", SERVER_OWNED)
def test_a_user_can_set_no_server_owned_column(shared: AppDatabase, people: dict[str, UUID], change: str) -> None:
    assert move(shared, people, "owner", State.QUEUED, change) == (0, "42501")


@pytest.mark.parametrize(
    "change",
    ["priority = 7", "run_after = now() + interval '1 h'", "hyperparameters = '{\"epochs\": 1}'", "gpu_config = '{}'"],
)
def test_a_queued_jobs_spec_may_be_changed_by_its_service_and_a_running_ones_not(
    shared: AppDatabase, people: dict[str, UUID], change: str
) -> None:
    assert move(shared, people, "service_role", State.QUEUED, change) == (1, None)
    for origin in HELD | FINAL:
        assert move(shared, people, "service_role", origin, change) == (0, PT409)
    assert move(shared, people, "service_role", State.RUNNING, "max_cost = 100") == (1, None)


def test_the_older_dispatchers_rows_are_left_to_it(shared: AppDatabase, people: dict[str, UUID]) -> None:
    for change in ("progress = 40, current_stage = 'training'", "status = 'completed', progress = 100"):
        assert move(shared, people, "service_role", State.RUNNING, change, epoch=0) == (1, None)
    assert move(shared, people, "service_role", State.INITIALIZING, "status = 'running'", epoch=0) == (1, None)
    # What is queued is ours: the older edge function's writes are refused, and it ignores the refusals.
    for change in ("status = 'initializing'", "status = 'running', external_job_id = 'pod-1'"):
        assert move(shared, people, "service_role", State.QUEUED, change, epoch=0) == (0, PT409)


async def test_a_time_on_a_row_of_the_older_dispatcher_keeps_no_daemon_awake(
    store: SqlJobStore, database: AppDatabase, user: UUID
) -> None:
    job_id = orphan(database, user)
    with database.acting("service_role") as service:
        service.execute("UPDATE training_jobs SET run_after = now(), progress = 40")
    assert database.job(job_id)["progress"] == 40
    assert await store.next_due_in() is None


def test_a_row_that_the_older_dispatcher_puts_back_is_held(database: AppDatabase) -> None:
    job_id = database.insert_job(database.insert_user())
    with database.connect() as connection, connection.transaction():
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute("UPDATE training_jobs SET status = 'running', due = false WHERE id = %s", (job_id,))
    with database.acting("service_role") as service:
        service.execute("UPDATE training_jobs SET status = 'queued' WHERE id = %s", (job_id,))
    row = database.job(job_id)
    assert (row["status"], row["due"], row["held"]) == ("queued", False, True)


def test_the_apps_cancel_is_the_databases_clock_and_cost(database: AppDatabase) -> None:
    user = database.insert_user()
    job_id = database.insert_job(user)
    with database.acting("authenticated", user) as owner:
        changed = owner.execute(
            "UPDATE training_jobs SET status = 'cancelled', completed_at = '2001-01-01', final_cost = 999"
        ).rowcount
    row = database.job(job_id)
    assert changed == 1 and row["status"] == "cancelled" and row["final_cost"] == 0 and not row["due"]
    assert row["completed_at"] >= row["queued_at"]


def test_cancelling_twice_changes_nothing(database: AppDatabase) -> None:
    user = database.insert_user()
    job_id = database.insert_job(user)
    cancel = "UPDATE training_jobs SET status = 'cancelled', completed_at = now(), final_cost = 5 WHERE id = %s"
    with database.acting("authenticated", user) as owner:
        owner.execute(cancel, (job_id,))
    first = database.job(job_id)
    for role in ("authenticated", "service_role"):
        with database.acting(role, user) as caller:
            assert caller.execute(cancel, (job_id,)).rowcount == 1
    second = database.job(job_id)
    assert {**first, "updated_at": None} == {**second, "updated_at": None}
    assert database.story(job_id) == ["queued", "cancelled"]


@pytest.mark.parametrize("status", ["initializing", "running", "completed", "failed", "cancelled", "nonsense"])
@pytest.mark.parametrize("role", ["authenticated", "service_role", "training_daemon", "postgres"])
def test_a_job_is_inserted_only_as_queued(shared: AppDatabase, people: dict[str, UUID], role: str, status: str) -> None:
    user = people["owner"]
    job = app_job(user, shared.insert_dataset(user)) | {"status": status}
    with pytest.raises(psycopg.Error) as refusal, shared.acting(role, user) as caller:
        caller.execute(*map_bytes(insert_statement("training_jobs", job)))
    assert refusal.value.sqlstate == PT409


def test_what_the_server_owns_is_reset_at_the_insert(database: AppDatabase) -> None:
    user = database.insert_user()
    dataset = database.insert_dataset(user)
    wishes = {
        "progress": 99, "current_cost": 50, "final_cost": 1, "lease_epoch": 7, "lease_token": str(uuid4()),
        "attempt": 9,
        "retry_count": 4,
        "adapter_path": "x", "error_message": "x", "external_job_id": "x", "due": False, "held": True,
        "priority": 1000, "max_attempts": 100, "queued_at": "2001-01-01", "started_at": "2001-01-01",
        "need_gpus": 0, "result": {"x": 1}, "base_model": "x", "trained_with": {"first_step_at": "x"},
        "deployed_at": "2001-01-01", "deployed_as": "x", "deployment_note": "x",
    }  # fmt: skip
    with database.acting("authenticated", user) as owner:
        text, values = insert_statement("training_jobs", app_job(user, dataset) | wishes)
        inserted = owner.execute(text.encode(), values).fetchone()
    assert inserted is not None
    row = database.job(inserted["id"])
    assert (row["progress"], row["current_cost"], row["final_cost"], row["retry_count"]) == (0, 0, None, 0)
    assert (row["lease_epoch"], row["attempt"], row["priority"], row["max_attempts"]) == (0, 0, 0, 3)
    assert (row["lease_token"], row["adapter_path"], row["error_message"], row["external_job_id"], row["result"]) == (
        None,
    ) * 5
    assert row["trained_with"] is None
    assert (row["deployed_at"], row["deployed_as"], row["deployment_note"]) == (None,) * 3
    assert row["base_model"] == row["hyperparameters"].get("base_model")
    assert row["due"] and not row["held"] and row["need_gpus"] == 1 and row["started_at"] is None
    assert row["queued_at"].year > 2001


def test_a_service_may_choose_priority_and_attempts(database: AppDatabase) -> None:
    user = database.insert_user()
    dataset = database.insert_dataset(user)
    with database.acting("service_role") as service:
        text, values = insert_statement("training_jobs", app_job(user, dataset) | {"priority": 9, "max_attempts": 5})
        service.execute(text.encode(), values)
    row = database.one("SELECT priority, max_attempts FROM training_jobs")
    assert (row["priority"], row["max_attempts"]) == (9, 5)


@pytest.mark.parametrize("role", ["authenticated", "service_role"])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("run_after", "infinity"),
        ("run_after", "20000-01-01"),
        ("deadline_at", "infinity"),
        ("deadline_at", "-infinity"),
        ("deadline_at", "20000-01-01"),
        ("deadline_at", "0044-03-15 BC"),
        ("max_cost", "NaN"),
        ("max_cost", "0"),
    ],
)
def test_a_limit_that_no_daemon_could_read_is_refused(
    shared: AppDatabase, people: dict[str, UUID], role: str, column: str, value: str
) -> None:
    user = people["owner"]
    job = app_job(user, shared.insert_dataset(user)) | {column: value}
    with (
        pytest.raises(psycopg.errors.CheckViolation, match=f"{column} must be"),
        shared.acting(role, user) as caller,
    ):
        caller.execute(*map_bytes(insert_statement("training_jobs", job)))
    assert move(shared, people, "service_role", State.QUEUED, f"{column} = '{value}'") == (0, "23514")


def test_a_user_cannot_train_on_another_users_dataset(database: AppDatabase) -> None:
    user, other = database.insert_user(), database.insert_user()
    theirs = database.insert_dataset(other)
    with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting("authenticated", user) as caller:
        caller.execute(*map_bytes(insert_statement("training_jobs", app_job(user, theirs))))


def test_a_user_may_rename_his_dataset_and_not_point_it_at_anothers_file(database: AppDatabase) -> None:
    """Which paths are whose: tests/dataset/test_paths.py."""
    user = database.insert_user()
    database.insert_dataset(user)
    with database.acting("authenticated", user) as owner:
        assert owner.execute("UPDATE datasets SET name = 'renamed'").rowcount == 1
    with pytest.raises(psycopg.errors.InsufficientPrivilege), database.acting("authenticated", user) as owner:
        owner.execute("UPDATE datasets SET storage_path = 'someone-else/data.jsonl'")


@pytest.mark.parametrize("role", ["authenticated", "service_role", "training_daemon"])
def test_a_url_alone_is_a_dataset(database: AppDatabase, role: str) -> None:
    user = database.insert_user()
    with database.acting(role, user) as caller:
        row = caller.execute(
            "INSERT INTO training_jobs (user_id, dataset_url) VALUES (%s, %s) RETURNING *",
            (user, "https://name:secret@files.example.org/sets/chat.jsonl?token=hidden#x"),
        ).fetchone()
    assert row is not None and row["preset_id"] == "custom" and row["hyperparameters"] == {} and row["due"]
    dataset = database.one("SELECT * FROM datasets WHERE id = %s", (row["dataset_id"],))
    assert (dataset["user_id"], dataset["storage_path"]) == (user, f"urls/{row['id']}")
    assert (
        dataset["name"] == "chat.jsonl"
        and dataset["description"] == "Read from https://files.example.org/sets/chat.jsonl"
    )


UPSERT = (
    "INSERT INTO training_jobs (id, user_id, dataset_url) VALUES (%(id)s, %(user)s, %(url)s) ON CONFLICT (id) "
    "DO UPDATE SET user_id = excluded.user_id, dataset_url = excluded.dataset_url, dataset_id = excluded.dataset_id "
    "RETURNING *"
)


def url_dataset(database: AppDatabase, job_id: UUID) -> tuple[UUID, str, str]:
    row = database.one("SELECT * FROM datasets WHERE storage_path = %s", (f"urls/{job_id}",))
    return row["id"], row["name"], row["description"]


def test_an_upsert_keeps_the_dataset_of_its_url_and_tells_where_it_is_now(database: AppDatabase) -> None:
    user, job_id = database.insert_user(), uuid4()
    first, second, third = ({"id": job_id, "user": user, "url": f"https://x.example/{n}"} for n in "abc")
    for parameters in (first, first, second):
        with database.acting("service_role") as service:
            row = service.execute(UPSERT, parameters).fetchone()
        assert row is not None and row["dataset_url"] == parameters["url"] and row["due"]
    assert url_dataset(database, job_id) == (row["dataset_id"], "b", "Read from https://x.example/b")

    # One that changes nothing renames nothing.
    with database.acting("service_role") as service:
        service.execute(UPSERT[: UPSERT.index("UPDATE SET")] + "NOTHING", third)
    assert url_dataset(database, job_id)[1] == "b"

    # The job of a row that is gone, and of one that somebody else has.
    database.run("DELETE FROM training_jobs")
    with database.acting("authenticated", user) as owner:
        owner.execute("INSERT INTO training_jobs (id, user_id, dataset_url) VALUES (%(id)s, %(user)s, %(url)s)", third)
    assert url_dataset(database, job_id) == (row["dataset_id"], "c", "Read from https://x.example/c")
    stranger = first | {"user": database.insert_user()}
    with pytest.raises(psycopg.Error, match="is taken"), database.acting("service_role") as service:
        service.execute(UPSERT, stranger)


def test_a_queued_jobs_new_url_names_its_dataset_anew(database: AppDatabase) -> None:
    user = database.insert_user()
    insert = "INSERT INTO training_jobs (user_id, dataset_url) VALUES (%s, 'https://x.example/a') RETURNING id"
    job_id = database.one(insert, (user,))["id"]
    with database.acting("service_role") as service:
        service.execute("UPDATE training_jobs SET dataset_url = 'https://x.example/b?token=hidden'")
    assert url_dataset(database, job_id)[1:] == ("b", "Read from https://x.example/b")


def test_a_job_without_any_dataset_is_told_what_to_give(database: AppDatabase) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation, match="a job needs a dataset"):
        database.run("INSERT INTO training_jobs (user_id) VALUES (%s)", (database.insert_user(),))


@pytest.mark.parametrize(
    ("gpu_config", "needs"),
    [
        ({"gpu_type": "H100", "num_gpus": 2, "gpu_memory_gb": 80, "cost_per_gpu_hour": 1}, (2, 80, "H100")),
        ({"type": "A100", "count": 4}, (4, None, "A100")),
        ({"num_gpus": "3", "gpu_memory_gb": "48.5"}, (3, 48.5, None)),
        ({"num_gpus": 2.0}, (2, None, None)),
        ({}, (1, None, None)),
        ([1, 2], (1, None, None)),
        ("text", (1, None, None)),
        ({"num_gpus": -3, "gpu_memory_gb": -1, "gpu_type": 5}, (1, None, None)),
        ({"num_gpus": 0}, (1, None, None)),
        ({"num_gpus": 1e300, "gpu_memory_gb": 1e300, "gpu_type": {"a": 1}}, (1, None, None)),
        ({"num_gpus": "many", "gpu_memory_gb": "NaN", "type": "x" * 500}, (1, None, "x" * 100)),
    ],
)
def test_needs_are_read_from_both_spellings_and_garbage_never_breaks_an_insert(
    database: AppDatabase, gpu_config: Any, needs: tuple[int, float | None, str | None]
) -> None:
    user = database.insert_user()
    dataset = database.insert_dataset(user)
    row = database.one(
        "INSERT INTO training_jobs (user_id, dataset_id, gpu_config, hyperparameters) "
        "VALUES (%s, %s, %s, %s) RETURNING *",
        (user, dataset, Jsonb(gpu_config), Jsonb([])),
    )
    memory = None if row["need_gpu_memory_gb"] is None else float(row["need_gpu_memory_gb"])
    assert (row["need_gpus"], memory, row["need_gpu_type"]) == needs and row["base_model"] is None


def test_needs_follow_a_change_while_queued(database: AppDatabase) -> None:
    user = database.insert_user()
    job_id = database.insert_job(user)
    with database.acting("service_role") as service:
        service.execute(
            """UPDATE training_jobs SET gpu_config = '{"count": 8}', hyperparameters = '{"base_model": "a/b"}'"""
        )
    row = database.job(job_id)
    assert (row["need_gpus"], row["base_model"], row["need_gpu_memory_gb"]) == (8, "a/b", None)
