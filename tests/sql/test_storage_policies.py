"""Who may read, write and delete which object in Storage: own datasets and own adapters, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from daemon.database.embedded_server import EmbeddedPostgres
from daemon.schema.migrations import bring_up_to_date, faults, migrations
from daemon.schema.sql_script import split_statements
from tests.postgres import AppDatabase, Server, hosted_project

(MIGRATION,) = (one.sql for one in migrations() if one.name == "storage_policies")
BUCKETS = ("lora-datasets", "lora-models")
ONE, TWO = "adapters/one.tar.gz", "adapters/two.tar.gz"
# The tables as Supabase's Storage server makes them, as far as row security is concerned, and its grants: everything
# to every role, so that the policies alone decide.
STORAGE = """
    CREATE SCHEMA storage;
    CREATE TABLE storage.buckets (id text PRIMARY KEY, name text NOT NULL UNIQUE, public boolean DEFAULT false);
    CREATE TABLE storage.objects (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        bucket_id text REFERENCES storage.buckets (id),
        name text,
        owner_id text,
        UNIQUE (bucket_id, name)
    );
    ALTER TABLE storage.buckets ENABLE ROW LEVEL SECURITY;
    ALTER TABLE storage.objects ENABLE ROW LEVEL SECURITY;
    GRANT USAGE ON SCHEMA storage TO anon, authenticated, service_role;
    GRANT ALL ON storage.buckets, storage.objects TO anon, authenticated, service_role
"""


def apply(database: AppDatabase, script: str) -> list[str]:
    """Runs a migration's file as `migrate` does; returns the warnings."""
    warnings: list[str] = []
    with database.connect() as connection, connection.transaction():
        connection.execute("SET LOCAL client_min_messages = warning")
        connection.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
        for statement in split_statements(script):
            connection.execute(statement.encode())
    return warnings


@pytest.fixture
def storage(postgres: Server, migrated_template: str) -> Iterator[AppDatabase]:
    """Supabase Storage came after the other migrations."""
    with postgres.database(template=migrated_template) as name:
        app = AppDatabase(postgres.dsn(name))
        for statement in split_statements(STORAGE):
            app.run(statement)
        assert apply(app, MIGRATION) == []
        yield app
        app.close()


def put(database: AppDatabase, bucket: str, name: str) -> str:
    """Stores an object past row security; returns its path with the bucket."""
    database.run("INSERT INTO storage.objects (bucket_id, name) VALUES (%s, %s)", (bucket, name))
    return f"{bucket}/{name}"


def seen(database: AppDatabase, role: str, user: UUID | None = None) -> set[str]:
    with database.acting(role, user) as caller:
        return {
            row["path"]
            for row in caller.execute("SELECT bucket_id || '/' || name AS path FROM storage.objects").fetchall()
        }


def may_upload(database: AppDatabase, bucket: str, name: str, role: str, user: UUID | None = None) -> bool:
    """As Storage tries it: it inserts the object's row as the caller, and reads it back."""
    try:
        with database.acting(role, user) as caller:
            text = "INSERT INTO storage.objects (bucket_id, name) VALUES (%s, %s) RETURNING *"
            caller.execute(text, (bucket, name))
            raise _Undo
    except psycopg.errors.InsufficientPrivilege:
        return False
    except _Undo:
        return True


class _Undo(Exception):
    """Rolls back an upload that was allowed."""


def adapter_of(database: AppDatabase, user: UUID, artifacts: object) -> None:
    dataset = database.insert_dataset(user)
    job = database.insert_job(user, dataset)
    database.run(
        "INSERT INTO model_artifacts (user_id, job_id, dataset_id, name, quality_metrics, training_summary, "
        "configuration, artifacts) VALUES (%s, %s, %s, 'one', '{}', '{}', '{}', %s)",
        (user, job, dataset, Jsonb(artifacts)),
    )


def test_both_buckets_are_made_and_private(storage: AppDatabase) -> None:
    assert storage.run("SELECT id, public FROM storage.buckets ORDER BY id") == [
        {"id": bucket, "public": False} for bucket in BUCKETS
    ]


def test_a_user_uploads_below_his_own_id_and_nowhere_else(storage: AppDatabase) -> None:
    user, other = storage.insert_user(), storage.insert_user()
    assert may_upload(storage, "lora-datasets", f"{user}/one/data.jsonl", "authenticated", user)
    for bucket, name in (
        ("lora-datasets", f"{other}/data.jsonl"),
        ("lora-datasets", f"{user}"),
        ("lora-datasets", f"{user}x/data.jsonl"),
        ("lora-datasets", "data.jsonl"),
        ("lora-datasets", f"x/{user}/data.jsonl"),
        ("lora-datasets", f"{user}/../{other}/data.jsonl"),
        ("lora-datasets", f"{user}//data.jsonl"),
        ("lora-datasets", f"{user}/"),
        ("lora-models", f"{user}/data.jsonl"),
        ("lora-models", "adapters/one.tar.gz"),
    ):
        assert not may_upload(storage, bucket, name, "authenticated", user), (bucket, name)


def test_what_may_be_uploaded_may_be_trained_on(storage: AppDatabase) -> None:
    user = storage.insert_user()
    for name in ("data.jsonl", "a b/c.jsonl", "ü.jsonl", "a#b", "..", ".", "x" * 900, "it's (1).json", "a\\b", "a\nb"):
        path = f"{user}/{name}"
        try:
            with storage.acting("authenticated", user) as app:
                app.execute(
                    "INSERT INTO datasets (user_id, name, storage_path, file_name, file_size) "
                    "VALUES (%s, 'one', %s, 'one', 1)",
                    (user, path),
                )
            trained = True
        except psycopg.errors.InsufficientPrivilege:
            trained = False
        assert may_upload(storage, "lora-datasets", path, "authenticated", user) == trained, name


def test_a_user_sees_his_own_datasets_and_the_adapters_of_his_own_artifacts(storage: AppDatabase) -> None:
    user, other = storage.insert_user(), storage.insert_user()
    mine = put(storage, "lora-datasets", f"{user}/data.jsonl")
    his = put(storage, "lora-datasets", f"{other}/data.jsonl")
    archive = put(storage, "lora-models", ONE)
    weights = put(storage, "lora-models", "adapters/one/adapter_model.safetensors")
    his_archive = put(storage, "lora-models", TWO)
    put(storage, "lora-models", "adapters/of-nobody.tar.gz")
    # The same path in the other bucket is another object.
    put(storage, "lora-models", f"{user}/data.jsonl")
    put(storage, "lora-datasets", ONE)
    paths = {"archive": ONE, "adapter_model": "adapters/one/adapter_model.safetensors"}
    adapter_of(storage, user, paths | {"count": 3, "more": {"x": TWO}})
    adapter_of(storage, other, {"archive": TWO})
    assert seen(storage, "authenticated", user) == {mine, archive, weights}
    assert seen(storage, "authenticated", other) == {his, his_archive}
    assert seen(storage, "authenticated", uuid4()) == set()
    assert seen(storage, "authenticated") == set()
    assert seen(storage, "anon") == set()
    assert len(seen(storage, "service_role")) == 8


@pytest.mark.parametrize("odd", [[], [TWO], TWO, 7, {}, {"archive": None}])
def test_an_artifact_of_another_shape_hides_and_opens_nothing(storage: AppDatabase, odd: object) -> None:
    user = storage.insert_user()
    archive = put(storage, "lora-models", ONE)
    put(storage, "lora-models", TWO)
    adapter_of(storage, user, {"archive": ONE})
    adapter_of(storage, user, odd)
    assert seen(storage, "authenticated", user) == {archive}


def test_a_user_cannot_point_his_artifact_at_somebody_elses_adapter(storage: AppDatabase) -> None:
    user = storage.insert_user()
    adapter_of(storage, user, {"archive": ONE})
    with pytest.raises(psycopg.errors.InsufficientPrivilege), storage.acting("authenticated", user) as app:
        app.execute('UPDATE model_artifacts SET artifacts = \'{"archive": "adapters/two.tar.gz"}\'')


def test_a_user_deletes_his_own_datasets_and_changes_nothing(storage: AppDatabase) -> None:
    user, other = storage.insert_user(), storage.insert_user()
    put(storage, "lora-datasets", f"{user}/data.jsonl")
    put(storage, "lora-datasets", f"{other}/data.jsonl")
    archive = put(storage, "lora-models", ONE)
    adapter_of(storage, user, {"archive": ONE})
    with storage.acting("authenticated", user) as app:
        assert app.execute("UPDATE storage.objects SET name = name || 'x'").rowcount == 0
        assert app.execute("DELETE FROM storage.objects").rowcount == 1
    assert seen(storage, "service_role") == {f"lora-datasets/{other}/data.jsonl", archive}


@pytest.mark.parametrize("role", ["anon", "training_daemon"])
def test_no_other_role_does_anything(storage: AppDatabase, role: str) -> None:
    user = storage.insert_user()
    put(storage, "lora-datasets", f"{user}/data.jsonl")
    # Granted what the API roles are granted, to see that no policy is meant for this one.
    storage.run(f"GRANT USAGE ON SCHEMA storage TO {role}")
    storage.run(f"GRANT ALL ON storage.objects TO {role}")
    assert seen(storage, role, user) == set()
    assert not may_upload(storage, "lora-datasets", f"{user}/more.jsonl", role, user)
    with storage.acting(role, user) as caller:
        assert caller.execute("DELETE FROM storage.objects").rowcount == 0


def test_a_listing_reads_the_users_artifacts_once(storage: AppDatabase) -> None:
    user = storage.insert_user()
    with storage.acting("authenticated", user) as app:
        rows = app.execute("EXPLAIN SELECT name FROM storage.objects WHERE bucket_id = 'lora-models'").fetchall()
    assert any("hashed SubPlan" in row["QUERY PLAN"] for row in rows), rows


def test_applied_again_it_is_the_same_and_the_apps_own_policies_stay(storage: AppDatabase) -> None:
    storage.run("CREATE POLICY avatars ON storage.objects FOR SELECT USING (bucket_id = 'avatars')")
    text = (
        "SELECT policyname, cmd, roles::text, qual, with_check FROM pg_policies WHERE schemaname = 'storage' ORDER BY 1"
    )
    before = storage.run(text)
    assert apply(storage, MIGRATION) == [] and storage.run(text) == before
    assert [row["policyname"] for row in before] == ["avatars", *(
        f"trainer_authenticated_{verb}" for verb in ("delete", "insert", "select")
    )]  # fmt: skip


def test_a_bucket_of_the_project_stays_as_it_is(storage: AppDatabase) -> None:
    storage.run("UPDATE storage.buckets SET public = NULL WHERE id = 'lora-models'")
    assert apply(storage, MIGRATION) == []
    assert storage.one("SELECT public FROM storage.buckets WHERE id = 'lora-models'")["public"] is None


def test_to_compare_the_schemas_storage_is_not_locked(storage: AppDatabase) -> None:
    with storage.connect() as user, user.transaction():
        user.execute("LOCK TABLE storage.objects, storage.buckets IN ROW EXCLUSIVE MODE")
        assert faults(storage.dsn) == []


def test_a_login_that_may_not_make_policies_is_told_and_migrates_all_the_same() -> None:
    with EmbeddedPostgres() as server:
        dsn = hosted_project(server)
        supabase = AppDatabase(server.dsn("app"))
        for statement in split_statements(STORAGE):
            supabase.run(statement)
        supabase.run("GRANT USAGE ON SCHEMA storage TO app_owner")
        supabase.run("GRANT ALL ON storage.buckets, storage.objects TO app_owner")
        done = bring_up_to_date(dsn, local=False)
        assert any(one.endswith("_storage_policies") for one in done.applied)
        assert supabase.run("SELECT policyname FROM pg_policies WHERE schemaname = 'storage'") == []
        (warning,) = done.warnings
        assert warning.startswith("this login may not make buckets or policies in Storage: must be owner")
        assert warning.endswith("run 20261128000028_storage_policies.sql again as the owner of storage.objects")
        supabase.close()
