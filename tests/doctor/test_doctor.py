"""The doctor: each line green where the thing works, and red with advice where it does not; by JSON and exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from daemon.doctor import host_checks as doctor_host
from daemon.doctor import service_checks as doctor_services
from daemon.doctor.check_result import CheckResult, Status
from daemon.doctor.endpoint_check import check_endpoint
from daemon.doctor.host_checks import check_disk, check_model, findings_of
from daemon.doctor.run import examine
from daemon.doctor.service_checks import check_callbacks, check_database, check_storage
from daemon.host.gpus import GpuList
from daemon.host.inspect import installed_versions
from daemon.read_settings import load_settings
from daemon.settings import Settings
from daemon.trainer.run_selfcheck import read_selfcheck, run_selfcheck
from tests.doubles.endpoint import EndpointDouble
from tests.doubles.storage import Bucket, StorageDouble
from tests.doubles.storage_keys import ANON_KEY, PUBLISHABLE_KEY
from tests.forked_process import PipedProcess, forker
from tests.lifecycle.queue import write_model_folder
from tests.paths import COMMAND_LINE, DOUBLES, ROOT
from tests.postgres import AppDatabase, Server

# What `python -m training.preflight.selfcheck cuda --kernels` says on an H100 with everything installed.
CARD = {
    "torch": "2.13.0", "transformers": "5.23.0", "bitsandbytes": "0.50.2", "cuda_available": True, "cuda": "13.0",
    "bf16": True, "capability": "9.0", "driver_cuda": "13.0", "nf4_error": None, "flash_linear_attention": None,
    "causal_conv1d": None, "causal_conv1d_by_fla": False, "kernel_fault": None, "experts_fault": None,
}  # fmt: skip


def settings(folder: Path, **given: Any) -> Settings:
    usual = {
        "database_url": "postgresql://nobody@127.0.0.1:9/none",
        "device": "cpu",
        "models_dir": folder / "models",
        "work_dir": folder / "jobs",
        "storage_dir": folder / "storage",
        "default_model": "tiny",
        "model_downloads": False,
    }
    return load_settings(**(usual | given))


async def by_name(findings: AsyncIterator[CheckResult]) -> dict[str, CheckResult]:
    return {finding.name: finding async for finding in findings}


def assert_red(finding: CheckResult, *words: str, light: Status = Status.RED) -> None:
    assert finding.light is light, finding
    assert finding.advice, "a line that is not green says what to do"
    for word in words:
        assert word.lower() in f"{finding.detail} {finding.advice}".lower(), finding


# -- this machine ------------------------------------------------------------------------------------------------


def selfcheck(**differing: object) -> dict[str, CheckResult]:
    return {
        finding.name: finding for finding in findings_of(read_selfcheck(0, json.dumps(CARD | differing), ""), "cuda")
    }


def test_a_card_with_everything_is_green_line_by_line() -> None:
    found = selfcheck()
    kernels = ["experts", "flash-linear-attention", "causal-conv1d", "linear attention"]
    assert list(found) == ["4-bit layers", "CUDA", "bf16", *kernels]
    assert {finding.light for finding in found.values()} == {Status.GREEN}
    assert found["causal-conv1d"].detail == "installed"
    assert "stands in" in selfcheck(causal_conv1d_by_fla=True)["causal-conv1d"].detail


@pytest.mark.parametrize(
    ("differing", "line", "light", "words"),
    [
        ({"nf4_error": "RuntimeError: no kernel image"}, "4-bit layers", Status.RED, ["no kernel image", "reinstall"]),
        ({"cuda_available": False}, "CUDA", Status.RED, ["2.13.0 sees no GPU", "nvidia-smi"]),
        ({"cuda_available": False, "cuda": None}, "CUDA", Status.RED, ["a build for CPUs", "build for CUDA"]),
        (
            {"cuda_available": False, "driver_cuda": "12.8"},
            "CUDA",
            Status.RED,
            ["built for CUDA 13.0", "driver serves CUDA 12.8", "TORCH=2.13.0+cu126"],
        ),
        ({"bf16": False}, "bf16", Status.RED, ["Ampere"]),
        ({"flash_linear_attention": "is not installed"}, "flash-linear-attention", Status.YELLOW, ["pip install"]),
        ({"causal_conv1d": "is not installed"}, "causal-conv1d", Status.YELLOW, ["a wheel for this torch"]),
        (
            {"kernel_fault": "fla-core 0.6.0, Triton 3.5.1: the gradient of k is off by 90%"},
            "linear attention",
            Status.RED,
            ["Triton 3.5.1", "gradient of k", "refused", "constraints.txt"],
        ),
        ({"experts_fault": "RuntimeError: no kernel"}, "experts", Status.RED, ["no kernel", "reinstall torch"]),
    ],
)
def test_each_fault_of_a_card_has_its_line(
    differing: dict[str, object], line: str, light: Status, words: list[str]
) -> None:
    assert_red(selfcheck(**differing)[line], *words, light=light)


def test_libraries_that_do_not_load_are_red_with_their_last_word() -> None:
    said = read_selfcheck(1, "", "Traceback …\nImportError: libcudart.so.12: cannot open\n")
    (finding,) = findings_of(said, "cuda")
    assert_red(finding, "libcudart.so.12", "constraints.txt")


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_host.check_python().light is Status.GREEN
    monkeypatch.setattr(doctor_host, "installed_versions", lambda: {"python": "3.11.2", "torch": "2.13.0"})
    assert_red(doctor_host.check_python(), "bitsandbytes, peft, transformers, trl", "pip install")


def test_a_torch_below_the_floor_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, needs in {"torch": "2.11.0", "brightrun-trainer": "torch>=2.13"}.items():
        info = tmp_path / f"{name.replace('-', '_')}-2.11.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.11.0\nRequires-Dist: {needs}\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert_red(doctor_host.check_python(), "torch>=2.13, and 2.11.0 is installed", "constraints.txt")


async def test_a_selfcheck_without_a_card_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real process, which asks NVML for the driver and PyTorch for the card."""
    monkeypatch.setenv("PYTHONPATH", f"{DOUBLES / 'nvml'}:{ROOT}")
    checked = await run_selfcheck("cuda", ["GPU-00c0ffee"], seconds=120, kernels=True)
    assert checked.fault is not None and "sees no GPU" in checked.fault
    assert checked.found["driver_cuda"] == "13.0"
    (finding,) = findings_of(checked, "cuda")
    assert_red(finding, "sees no GPU", "a build for CPUs" if checked.found["cuda"] is None else "nvidia-smi")


async def test_a_trainer_that_does_not_answer_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "SELFCHECK_SECONDS", 0.0)
    (finding,) = [finding async for finding in doctor_host.check_trainer(settings(tmp_path))]
    assert_red(finding, "no answer", "nvidia-smi")


def test_a_missing_card_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "list_gpus", GpuList)
    assert_red(doctor_host.check_device(settings(tmp_path, device="auto")), "nvidia-smi", "TRAINER_DEVICE=cpu")


async def test_a_model_that_is_absent_cut_or_whole_is_told_apart(tmp_path: Path) -> None:
    here = settings(tmp_path)
    assert_red((await by_name(check_model(here)))["default model"], "tiny")
    pull = settings(tmp_path, default_model="org/tiny", model_downloads=True)
    assert_red((await by_name(check_model(pull)))["default model"], "models pull org/tiny", light=Status.YELLOW)

    folder = tmp_path / "models" / "tiny"
    write_model_folder(folder)
    found = await by_name(check_model(here))
    assert found["default model"].light is Status.GREEN
    assert_red(found["4-bit copy"], "none yet", "models quantize tiny", light=Status.YELLOW)

    weights = next(folder.glob("*.safetensors"))
    weights.unlink()
    assert_red((await by_name(check_model(here)))["default model"], weights.name)


async def test_a_copy_of_other_libraries_or_without_a_file_is_not_taken_for_one(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "models" / "tiny")
    copy = tmp_path / "models" / ".quantized" / "tiny-nf4-0123456789abcdef"
    copy.mkdir(parents=True)
    versions = {name: installed_versions()[name] for name in ("bitsandbytes", "transformers", "torch")}

    async def light_with(versions: dict[str, str], files: list[str]) -> CheckResult:
        manifest = {"fingerprint": {"versions": versions}, "files": dict.fromkeys(files, "hash")}
        (copy / "manifest.json").write_text(json.dumps(manifest))
        return (await by_name(check_model(settings(tmp_path))))["4-bit copy"]

    assert_red(await light_with(versions, ["weights-00000.safetensors"]), "weights-00000", light=Status.YELLOW)
    (copy / "weights-00000.safetensors").write_bytes(b"weights")
    assert (await light_with(versions, ["weights-00000.safetensors"])).light is Status.GREEN
    assert_red(await light_with(versions | {"torch": "1.0"}, []), "torch 1.0", light=Status.YELLOW)
    (copy / "manifest.json").write_text("cut")
    assert_red((await by_name(check_model(settings(tmp_path))))["4-bit copy"], "cannot be read", light=Status.YELLOW)


@pytest.mark.parametrize(("name", "variable"), [("work folder", "WORK_DIR"), ("models folder", "MODELS_DIR")])
def test_a_folder_that_cannot_be_written_is_red_with_its_variable(name: str, variable: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert_red(check_disk(name, tmp_path / "file" / "below"), f"TRAINER_{variable}")
    assert check_disk(name, tmp_path / "new").light is not Status.RED
    assert not list((tmp_path / "new").iterdir()), "the probe was removed"


def test_a_full_or_slow_disk_is_not_green(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "MIN_FREE_GIB", 1e9)
    assert_red(check_disk("work folder", tmp_path), "enlarge")
    monkeypatch.setattr(doctor_host, "MIN_FREE_GIB", 0.0)
    monkeypatch.setattr(doctor_host, "SLOW_DISK_MB_A_SECOND", 1e9)
    assert_red(check_disk("work folder", tmp_path), "slow", light=Status.YELLOW)


# -- the database ------------------------------------------------------------------------------------------------


@pytest.fixture
def daemons_url(database: AppDatabase) -> Iterator[str]:
    """A login of the daemon's own, as the operator's guide makes it; the role is the server's, so it is taken back."""
    database.run("ALTER ROLE training_daemon LOGIN PASSWORD 'for-this-test'")
    yield as_url(database.dsn, "training_daemon", "for-this-test")
    database.run("ALTER ROLE training_daemon NOLOGIN PASSWORD NULL")


def as_url(dsn: str, user: str, password: str) -> str:
    host = dsn.partition("@")[2]
    return f"postgresql://{user}:{password}@{host}"


async def test_a_database_as_the_guide_sets_it_up_is_green(daemons_url: str, tmp_path: Path) -> None:
    found = await by_name(check_database(settings(tmp_path, database_url=daemons_url)))
    assert [name for name, finding in found.items() if finding.light is not Status.GREEN] == []
    names = (
        "database",
        "migrations",
        "database role",
        "rights",
        "installation",
        "row security",
        "clock",
        "older dispatcher",
        "hosts",
        "LISTEN",
    )
    expected = list(names)
    assert list(found) == expected
    assert "directly at 127.0.0.1" in found["database"].detail


async def test_what_living_hosts_say_of_themselves_is_red_with_what_to_do(
    database: AppDatabase, daemons_url: str, tmp_path: Path
) -> None:
    trouble = {
        "name": "work folder",
        "message": "/data: full. Free space",
        "since": "2026-01-02T03:04:05+00:00",
        "times": 1,
    }
    database.run(
        "INSERT INTO training_workers (id, host, device, state, data) VALUES "
        "(gen_random_uuid(), 'sick', 'cpu', 'out_of_service', %s), (gen_random_uuid(), 'well', 'cpu', 'idle', '{}')",
        (Jsonb({"troubles": [trouble]}),),
    )
    found = await by_name(check_database(settings(tmp_path, database_url=daemons_url)))
    assert_red(found["host sick"], "claims nothing; work folder since 2026-01-02T03:04:05: /data: full", "Free space")
    assert "host well" not in found and "hosts" not in found


async def test_a_login_that_may_not_see_what_was_applied_still_gets_every_other_line(
    database: AppDatabase, daemons_url: str, tmp_path: Path
) -> None:
    database.run("REVOKE USAGE ON SCHEMA supabase_migrations FROM training_daemon")
    found = await by_name(check_database(settings(tmp_path, database_url=daemons_url)))
    assert_red(found["migrations"], "may not read", "migrate", light=Status.YELLOW)
    assert found["LISTEN"].light is Status.GREEN


async def test_a_database_that_does_not_answer_is_red_and_nothing_more_is_asked(tmp_path: Path) -> None:
    found = await by_name(check_database(settings(tmp_path)))
    assert list(found) == ["database"]
    assert_red(found["database"], "DATABASE_URL")


async def test_a_wrong_password_is_red_and_not_shown(database: AppDatabase, tmp_path: Path) -> None:
    url = as_url(database.dsn, "nobody_of_ours", "marked-password")
    found = await by_name(check_database(settings(tmp_path, database_url=url)))
    assert_red(found["database"], "password")
    assert "marked-password" not in repr(found)


async def test_a_database_without_the_migrations_is_red(postgres: Server, tmp_path: Path) -> None:
    with postgres.database() as name:
        found = await by_name(check_database(settings(tmp_path, database_url=postgres.dsn(name))))
    assert list(found) == ["database", "migrations"]
    assert_red(found["migrations"], "not applied", "brightrun-trainer migrate")


async def test_the_administrators_login_is_named(database: AppDatabase, tmp_path: Path) -> None:
    found = await by_name(check_database(settings(tmp_path, database_url=database.dsn)))
    assert_red(found["database role"], "ALTER ROLE training_daemon", light=Status.YELLOW)


async def test_a_right_that_is_lacking_is_named(database: AppDatabase, tmp_path: Path) -> None:
    database.run("REVOKE INSERT ON metrics_points FROM training_daemon")
    database.run("REVOKE DELETE ON training_leases FROM training_daemon")
    found = await by_name(check_database(settings(tmp_path, database_url=database.dsn)))
    assert_red(found["rights"], "INSERT on metrics_points", "DELETE on training_leases", "migrate")


async def test_a_login_that_may_not_become_the_daemon_is_red(database: AppDatabase, tmp_path: Path) -> None:
    database.run("CREATE ROLE stranger_of_doctor LOGIN PASSWORD 'for-this-test'")
    try:
        database.run("GRANT USAGE ON SCHEMA supabase_migrations TO stranger_of_doctor")
        database.run("GRANT SELECT ON supabase_migrations.schema_migrations TO stranger_of_doctor")
        url = as_url(database.dsn, "stranger_of_doctor", "for-this-test")
        found = await by_name(check_database(settings(tmp_path, database_url=url)))
        assert_red(found["database role"], "GRANT training_daemon TO stranger_of_doctor")
    finally:
        database.run("DROP OWNED BY stranger_of_doctor")
        database.run("DROP ROLE stranger_of_doctor")


async def test_notifications_that_do_not_arrive_are_red(
    database: AppDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time to hear one stands for a pooler that drops them."""
    monkeypatch.setattr(doctor_services, "HEARS_SECONDS", 0.0)
    found = await by_name(check_database(settings(tmp_path, database_url=database.dsn)))
    assert_red(found["LISTEN"], "transaction pooler", "5432")


async def test_a_clock_that_is_off_is_told(
    database: AppDatabase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Late(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(UTC) - timedelta(minutes=3)

    monkeypatch.setattr(doctor_services, "datetime", Late)
    found = await by_name(check_database(settings(tmp_path, database_url=database.dsn)))
    assert_red(found["clock"], "synchronise", light=Status.YELLOW)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("postgresql://u:p@aws-0-eu.pooler.supabase.com:6543/postgres", "by the transaction pooler"),
        ("postgresql://u:p@aws-0-eu.pooler.supabase.com:5432/postgres", "by the session pooler"),
        ("postgresql://u:p@db.project.supabase.co:5432/postgres", "directly"),
    ],
)
def test_the_kind_of_connection_is_read_from_its_address(address: str, kind: str) -> None:
    assert doctor_services._kind_of_connection(address).startswith(kind)


# -- storage and callbacks ---------------------------------------------------------------------------------------


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[StorageDouble]:
    async with StorageDouble(tmp_path / "double") as double:
        double.buckets["lora-models"] = Bucket()
        yield double


def with_storage(double: StorageDouble, folder: Path, **given: Any) -> Settings:
    supabase = {"supabase_url": double.url, "supabase_service_role_key": double.key, "allowed_hosts": double.host}
    return settings(folder, **(supabase | given))


async def test_storage_is_written_read_and_left_empty(storage: StorageDouble, tmp_path: Path) -> None:
    finding = await check_storage(with_storage(storage, tmp_path))
    assert finding.light is Status.GREEN, finding
    assert not [file for file in storage.path_of("lora-models", "").rglob("*") if file.is_file()]


async def test_a_resumable_upload_is_tried_and_taken_back(storage: StorageDouble, tmp_path: Path) -> None:
    """The project's own limit is in no bucket's row."""
    storage.file_size_limit = 50 * 2**20
    small = await check_storage(with_storage(storage, tmp_path))
    assert_red(small, "Maximum size exceeded", "size limit", light=Status.YELLOW)
    storage.file_size_limit = None
    assert (await check_storage(with_storage(storage, tmp_path))).light is Status.GREEN
    assert {upload.gone_with for upload in storage.uploads.values()} == {404}


@pytest.mark.parametrize(("key", "said"), [(ANON_KEY, "anon key"), (PUBLISHABLE_KEY, "publishable key")])
async def test_a_key_of_the_browsers_is_told_by_its_name(
    storage: StorageDouble, tmp_path: Path, key: str, said: str
) -> None:
    finding = await check_storage(with_storage(storage, tmp_path, supabase_service_role_key=key))
    assert_red(finding, said, "SUPABASE_SERVICE_ROLE_KEY")
    assert key not in repr(finding)


async def test_a_wrong_key_a_narrow_bucket_and_a_small_one_are_told_apart(
    storage: StorageDouble, tmp_path: Path
) -> None:
    wrong = await check_storage(with_storage(storage, tmp_path, supabase_service_role_key="sb_secret_wrong"))
    assert_red(wrong)
    assert "sb_secret_wrong" not in repr(wrong)
    storage.buckets["lora-models"] = Bucket(allowed_mime_types=["image/png"])
    assert_red(await check_storage(with_storage(storage, tmp_path)), "MIME")
    storage.buckets["lora-models"] = Bucket(file_size_limit=50 * 2**20)
    small = await check_storage(with_storage(storage, tmp_path))
    assert_red(small, "52,428,800", "size limit", light=Status.YELLOW)


def test_a_callback_secret_that_is_none_is_red(tmp_path: Path) -> None:
    assert_red(check_callbacks(settings(tmp_path, callback_secrets="plain words")), "openssl")
    assert_red(check_callbacks(settings(tmp_path)), "TRAINER_CALLBACK_SECRETS", light=Status.YELLOW)
    good = settings(tmp_path, callback_secrets="whsec_aW1hZ2UtY2hlY2stc2VjcmV0LW9mLTMyLWJ5dGVzIQ==")
    assert check_callbacks(good).light is Status.GREEN


# -- the whole screen --------------------------------------------------------------------------------------------


def doctor(environment: dict[str, str], *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    given = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "TRAINER_DEVICE": "cpu",
        "TRAINER_DEFAULT_MODEL": "tiny",
        "TRAINER_MODELS_DIR": str(folder / "models"),
        "TRAINER_WORK_DIR": str(folder / "jobs"),
        "TRAINER_STORAGE_DIR": str(folder / "storage"),
    }
    process = PipedProcess(forker(str(COMMAND_LINE)), given | environment, folder, "doctor", *arguments)
    out, err = process.communicate(150)
    return subprocess.CompletedProcess(["doctor"], process.wait(10), out, err)


def test_the_screen_is_json_on_request_and_its_exit_code_says_red(database: AppDatabase, tmp_path: Path) -> None:
    write_model_folder(tmp_path / "models" / "tiny")
    healthy = doctor({"DATABASE_URL": database.dsn}, "--json", folder=tmp_path)
    found = [json.loads(line) for line in healthy.stdout.splitlines()]
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    expected = {"versions", "GPU", "4-bit layers", "default model", "4-bit copy", "work folder", "models folder"}
    expected |= {"database", "migrations", "rights", "clock", "LISTEN", "storage (folder)", "unfinished uploads"}
    expected |= {"callback secret", "RunPod"}
    assert expected <= {one["name"] for one in found}
    assert all(set(one) == {"name", "light", "detail", "advice"} for one in found)
    assert all(bool(one["advice"]) is (one["light"] != "ok") for one in found)


def test_a_screen_with_something_red_shows_advice_and_exits_1(tmp_path: Path) -> None:
    broken = doctor({"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}, folder=tmp_path)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert "✖ database" in broken.stdout and "→ Check DATABASE_URL" in broken.stdout
    assert "▲ callback secret" in broken.stdout and "● versions" in broken.stdout
    assert re.fullmatch(r"this host cannot work yet: \d red, \d yellow, \d+ green", broken.stdout.splitlines()[-1])


def test_unusable_settings_exit_78_and_name_the_variable(tmp_path: Path) -> None:
    unusable = doctor({"TRAINER_LEASE_SECONDS": "soon"}, folder=tmp_path)
    assert unusable.returncode == 78
    assert "TRAINER_LEASE_SECONDS" in unusable.stderr and "DATABASE_URL" in unusable.stderr


async def test_every_line_comes_even_where_everything_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "SELFCHECK_SECONDS", 0.0)
    (tmp_path / "file").write_text("")
    wrong = settings(
        tmp_path, device="auto", work_dir=tmp_path / "file" / "jobs", models_dir=tmp_path / "file" / "models",
        storage_dir=tmp_path / "file" / "storage", callback_secrets="x",
    )  # fmt: skip
    found = await by_name(examine(wrong))
    red = {name for name, finding in found.items() if finding.light is Status.RED}
    assert red >= {
        "trainer",
        "default model",
        "work folder",
        "models folder",
        "database",
        "storage (folder)",
        "callback secret",
    }
    assert all(finding.advice for finding in found.values() if finding.light is not Status.GREEN)


async def test_the_endpoint_answers_and_has_the_default_model(tmp_path: Path) -> None:
    assert await by_name(check_endpoint(settings(tmp_path))) == {}
    async with EndpointDouble("tiny", key="right") as endpoint:
        shared = tmp_path / "shared"
        here = settings(tmp_path, endpoint_url=endpoint.url, endpoint_key="right", endpoint_dir=shared)
        found = await by_name(check_endpoint(here))
        assert [finding.light for finding in found.values()] == [Status.GREEN] * 2
        assert "serves tiny and 0 adapters, ranks up to 16" in found["endpoint"].detail
        endpoint.base = endpoint.root = "another"
        shared.rmdir()
        shared.write_text("a file")
        found = await by_name(check_endpoint(here))
        assert_red(found["endpoint"], "not tiny", light=Status.YELLOW)
        assert_red(found["endpoint folder"], str(shared))
        endpoint.key = "another"
        assert_red((await by_name(check_endpoint(here)))["endpoint"], "HTTP 401")
