"""DATABASE_URL as people have it: understood, or refused in one line that holds no piece of a password."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import structlog
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from daemon.database.url import DatabaseUrlInvalid, is_transaction_pooler, read_database_url
from daemon.errors import HostUnfit
from daemon.fleet.pod_plan import read_plan
from daemon.logs import configure_logs, configure_logs_by
from daemon.read_settings import load_settings, secrets_of
from daemon.settings import Settings
from tests.cli.command import CommandLine
from tests.paths import DOUBLES, ROOT
from tests.postgres import AppDatabase

# Special characters everywhere, and no four of its letters in any word of ours.
PASSWORD = "Zq7x@Kw9v/Tr4m?Jb2n#Xc8d%Gy5f:Wp3h[Vs6k]Lz1q &Md0j"
ENCODED = quote(PASSWORD, safe="")


def parts(url: str) -> dict[str, Any]:
    return conninfo_to_dict(read_database_url(url).get_secret_value())


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cret@db.example:5432/app",
        "postgres://me:s3cret@db.example:5432/app",
        "POSTGRESQL://me:s3cret@db.example:5432/app",
        "  postgresql://me:s3cret@db.example:5432/app\n",
        "'postgresql://me:s3cret@db.example:5432/app'",
        '"postgresql://me:s3cret@db.example:5432/app"',
        "“postgresql://me:s3cret@db.example:5432/app”",
        "<postgresql://me:s3cret@db.example:5432/app>",
        "DATABASE_URL=postgresql://me:s3cret@db.example:5432/app",
        'export DATABASE_URL="postgresql://me:s3cret@db.example:5432/app";',
        "psql 'postgresql://me:s3cret@db.example:5432/app'",
        "psql -d postgresql://me:s3cret@db.example:5432/app",
        "postgresql+psycopg://me:s3cret@db.example:5432/app",
        "postgresql+asyncpg://me:s3cret@db.example:5432/app",
        "postgres+psycopg2://me:s3cret@db.example:5432/app",
        "jdbc:postgresql://db.example:5432/app?user=me&password=s3cret",
        "host=db.example port=5432 user=me password=s3cret dbname=app",
        "postgresql://db.example:5432/app?user=me&amp;password=s3cret",
    ],
)
def test_one_address_in_many_clothes_is_one_address(url: str) -> None:
    read = read_database_url(url)
    expected = {"host": "db.example", "port": "5432", "user": "me", "password": "s3cret", "dbname": "app"}
    assert conninfo_to_dict(read.get_secret_value()) == expected
    assert read.notices == ()
    assert "s3cret" in read.secrets and "s3cret" not in f"{read!r} {read}"


@pytest.mark.parametrize(
    ("url", "name", "expected"),
    [
        (f"postgresql://me:{ENCODED}@h/app", "password", PASSWORD),
        ("postgresql://me:a:b#c?d[e]f&g=h@h/app", "password", "a:b#c?d[e]f&g=h"),
        (r"host=h user=me password='it\'s \\ a b' dbname=app", "password", r"it's \ a b"),
        ("postgresql://me%40corp:x@h/app", "user", "me@corp"),
        ("postgresql://me:x@[2001:db8::1]:5432/app", "host", "2001:db8::1"),
        ("postgresql://me:x@[fe80::1%25eth0]/app", "host", "fe80::1%eth0"),
        ("postgresql://me:x@%2Fvar%2Frun%2Fpostgresql/app", "host", "/var/run/postgresql"),
        ("postgresql:///app?host=/var/run/postgresql", "host", "/var/run/postgresql"),
        ("postgresql://me:x@one:1,two:2/app", "host", "one,two"),
        ("postgresql://me:x@one:1,two:2/app?target_session_attrs=read-write", "port", "1,2"),
        ("postgresql://me:x@h/app?options=reference%3Dabcdef", "options", "reference=abcdef"),
        ("postgresql://me:x@h/app?ssl=true", "sslmode", "require"),
        ("postgresql://me:x@h/app?sslmode=no-verify", "sslmode", "require"),
        ("postgresql://me:x@h/app?sslmode=verify-full&sslrootcert=/a%20b.crt", "sslrootcert", "/a b.crt"),
    ],
)
def test_each_part_is_what_libpq_is_to_be_given(url: str, name: str, expected: str) -> None:
    assert parts(url)[name] == expected


def test_parameters_of_other_drivers_are_left_out_with_a_notice_each() -> None:
    others = "pgbouncer=true&connection_limit=1&pool_timeout=0&schema=private&supa=base&prepared_statements=false"
    read = read_database_url(f"postgresql://me:x@h:6543/app?{others}&sslmode=require&application_name=mine")
    assert set(conninfo_to_dict(read.get_secret_value())) == {
        "user", "password", "host", "port", "dbname", "sslmode", "application_name",
    }  # fmt: skip
    assert len(read.notices) == 6
    for name in ("pgbouncer", "connection_limit", "pool_timeout", "schema", "supa", "prepared_statements"):
        assert any(name in notice for notice in read.notices), name


def test_a_transaction_poolers_port_is_told_in_every_notation() -> None:
    for url in ("postgresql://u:p@h:6543/d", "host=h port=6543 user=u dbname=d", "postgresql://u:p@a:5432,b:6543/d"):
        assert is_transaction_pooler(read_database_url(url).get_secret_value())
    assert not is_transaction_pooler(read_database_url("postgresql://u:6543@h:5432/d").get_secret_value())


# -- what is refused: the address, and words of the line that names the part ---------------------------------------

LETTERS = "Zq7xKw9vTr4mJb2n"
REFUSED = {
    f"postgresql://me:{LETTERS}%{LETTERS}@h/app": "% in its password",
    f"postgresql://me:{LETTERS}@{LETTERS}@h/app": "cannot be split",
    f"postgresql://me:{LETTERS}/{LETTERS}@h/app": "cannot be split",
    f"postgresql://me:{LETTERS}@{LETTERS}/x@h:5432/app": "cannot be split",
    f"postgresql://me:{LETTERS}@{LETTERS}?x=y@h:5432/app": "cannot be split",
    f"postgresql://me:{PASSWORD}@h:5432/app": "cannot be split",
    f"postgresql://me:{LETTERS} {LETTERS}@h/app": "space in its password",
    f"postgresql://me:{LETTERS}%E9@h/app": "not UTF-8",
    f"postgresql://me:{LETTERS}%00@h/app": "%00 in its password",
    f"postgresql://me:{LETTERS}": "port that is not a number",
    f"postgresql://me:{LETTERS}@h:54x2/app": "port that is not a number",
    f"postgresql://me:{LETTERS}@h:99999/app": "port that is not a number",
    f"postgresql://me:{LETTERS}@{LETTERS}": "names no database",
    f"postgresql://me:{LETTERS}@/app": "names no host",
    f"postgresql://:{LETTERS}@h/app": "names no user",
    f"postgresql://me:{LETTERS}@h o/app": "host with characters",
    f"postgresql://me:{LETTERS}@h/app?sslmode=maybe": "unknown sslmode",
    f"postgresql://me:{LETTERS}@h/app?sslmod=require": "meant to be sslmode",
    f"postgresql://me:{LETTERS}@h/app?{LETTERS}=1": "parameter that no driver knows",
    f"postgresql://me:{LETTERS}@h/app?{LETTERS}": "not name=value",
    f"postgresql://me:{LETTERS}@h/app?connect_timeout={LETTERS}": "connect_timeout that is not a number",
    f"postgresql://me:{LETTERS}@h/app?application_name=%ZZ": "% in its value of a parameter",
    f"postgresql://me:{LETTERS}\n{LETTERS}@h/app": "line break",
    "postgresql://me:[YOUR-PASSWORD]@h/app": "placeholder",
    "postgresql://me:%5BYOUR-PASSWORD%5D@h/app": "placeholder",
    f"mysql://me:{LETTERS}@h/app": "must begin with postgresql://",
    f"https://{LETTERS}.supabase.co": "web address",
    LETTERS: "must begin with postgresql://",
    f"{LETTERS}==": "must begin with postgresql://",
    f"host=h user=me password={LETTERS} {LETTERS} dbname=app": "not a list of name=value",
    f"host=h user=me password=a {LETTERS}=b dbname=app": "parameter that no driver knows",
}


def pieces(password: str) -> set[str]:
    return {password[start : start + 4] for start in range(len(password) - 3)}


SECRET_PIECES = pieces(PASSWORD) | pieces(LETTERS)


def assert_tells_nothing(output: str) -> None:
    assert not [piece for piece in SECRET_PIECES if piece in output], output
    assert "Traceback" not in output


@pytest.mark.parametrize("url", REFUSED)
def test_what_is_wrong_is_named_in_one_line_and_no_piece_of_the_password(url: str) -> None:
    with pytest.raises(DatabaseUrlInvalid) as refused:
        read_database_url(url)
    line = str(refused.value)
    assert REFUSED[url] in line and "\n" not in line
    assert_tells_nothing(line)
    # Nor does the stack that a careless caller would print.
    assert refused.value.__cause__ is None and (refused.value.__suppress_context__ or refused.value.__context__ is None)
    with pytest.raises(HostUnfit, match="DATABASE_URL") as unfit:
        load_settings(database_url=url)
    assert_tells_nothing(str(unfit.value))


COMMANDS = (
    ("run",), ("serve",), ("fleet",), ("doctor",), ("migrate",), ("migrate", "--local"), ("jobs",), ("workers",),
    ("submit", "data.jsonl", "--user", "00000000-0000-0000-0000-000000000001"), ("show", "abcdef12"),
)  # fmt: skip


def said_by_every_command(urls: list[str], folder: Path) -> list[tuple[tuple[str, ...], str, dict[str, Any]]]:
    """Words, address, and what the command said and how it ended."""
    (folder / "data.jsonl").write_text('{"messages": []}\n')
    environment = CommandLine(folder).environment | {
        "TRAINER_DEVICE": "cpu",
        "TRAINER_MODELS_DIR": str(folder / "models"),
        "TRAINER_WORK_DIR": str(folder / "jobs"),
        "TRAINER_STORAGE_DIR": str(folder / "storage"),
        "TRAINER_GATEWAY_KEYS": "k" * 32,
        "TRAINER_GATEWAY_HOST": "127.0.0.1",
        "TRAINER_GATEWAY_PORT": "0",
        "TRAINER_RUNPOD_API_KEY": "key-of-nobody",
        "TRAINER_RUNPOD_API": "http://127.0.0.1:9",
        "TRAINER_FLEET_POD": '{"pod": {"image": "x"}, "gpus": [{"id": "H100"}]}',
        "TRAINER_MODEL_DOWNLOADS": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.database.every_url"],
        # The doctor would import torch for each address.
        env=environment | {"PYTHONPATH": f"{DOUBLES / 'no_torch'}{os.pathsep}{ROOT}"},
        cwd=folder,
        input=json.dumps([COMMANDS, urls]),
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [
        (words, url, said)
        for words, answers in zip(COMMANDS, json.loads(done.stdout), strict=True)
        for url, said in zip(urls, answers, strict=True)
    ]


def test_no_command_prints_a_piece_of_a_password_of_an_address_that_it_refuses(tmp_path: Path) -> None:
    for words, url, said in said_by_every_command(list(REFUSED), tmp_path):
        assert said["status"] == 78, (words, url, said)
        assert REFUSED[url] in said["output"] and "DATABASE_URL" in said["output"], (words, said)
        assert len(said["output"].strip().splitlines()) <= 2, (words, said)
        assert_tells_nothing(said["output"])


def test_no_command_prints_a_piece_of_a_password_that_the_server_refuses(database: AppDatabase, tmp_path: Path) -> None:
    place = urlsplit(database.dsn).netloc.rpartition("@")[2]
    name = urlsplit(database.dsn).path
    urls = [
        f"postgresql://nobody_of_ours:{ENCODED}@{place}{name}",
        f"postgresql+asyncpg://nobody_of_ours:{LETTERS}#{LETTERS}@{place}{name}?pgbouncer=true",
        f"psql 'postgresql://nobody_of_ours:{LETTERS}?{LETTERS}@{place}{name}'",
    ]
    for words, _url, said in said_by_every_command(urls, tmp_path):
        assert said["status"] == (1 if words == ("doctor",) else 78), (words, said)
        assert "password authentication failed" in said["output"], (words, said)
        assert "percent-encoded" in " ".join(said["output"].split()), (words, "what to do")
        assert_tells_nothing(said["output"])


@pytest.fixture
def odd_login(database: AppDatabase) -> Iterator[str]:
    """A login whose password holds every special character, as URL."""
    database.run("DROP ROLE IF EXISTS odd_password")
    database.run("CREATE ROLE odd_password LOGIN IN ROLE training_daemon PASSWORD '" + PASSWORD + "'")
    place = database.dsn.rpartition("@")[2]
    yield f"postgresql://odd_password:{ENCODED}@{place}"
    database.run("DROP ROLE odd_password")


def test_a_password_of_special_characters_and_another_drivers_parameters_log_in(odd_login: str, tmp_path: Path) -> None:
    joint = "&" if "?" in odd_login else "?"
    for url in (
        odd_login + joint + "pgbouncer=true&connection_limit=1",
        "'" + odd_login.replace("postgresql://", "postgresql+psycopg://") + joint + "pgbouncer=true'",
    ):
        said = CommandLine(tmp_path, DATABASE_URL=url).ok("jobs")
        assert "pgbouncer" in said.err and "left out" in said.err
        assert_tells_nothing(said.err + said.out)


# -- other secrets ---------------------------------------------------------------------------------------------------


def test_every_secret_among_the_settings_is_blotted_out_of_every_log(capfd: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {}
    marks = [PASSWORD, ENCODED]
    for name, field in Settings.model_fields.items():
        if name != "database_url" and "SecretStr" in str(field.annotation):
            mark = f"marked-{name}-of-32-characters-or-more"
            marks.append(mark)
            given[name] = (SecretStr(mark),) if "tuple" in str(field.annotation) else SecretStr(mark)
    assert len(marks) > 9, "the secrets are found by their type"
    url = f"postgresql://me:{ENCODED}@h/app"
    settings = Settings(_env_file=None, database_url=SecretStr(url)).model_copy(update=given)
    assert set(marks) <= set(secrets_of(settings))
    for style in ("json", "pretty"):
        configure_logs_by(settings.model_copy(update={"log_format": style}))
        log = structlog.get_logger()
        for mark in marks:
            try:
                held_by_the_frame = mark
                raise ValueError(f"refused {held_by_the_frame}")
            except ValueError:
                log.exception("failed", value=mark, nested={"list": [mark]})
        said = capfd.readouterr().err
        assert said.count("failed") >= len(marks) and "ValueError" in said
        assert not [mark for mark in marks if mark in said], said


def test_no_program_configures_its_log_without_the_secrets() -> None:
    """Most do it by the settings (configure_logs_by); who calls configure_logs names the secrets itself."""
    bare = [
        f"{file.relative_to(ROOT)}:{call.lineno}"
        for file in sorted((ROOT / "daemon").rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "configure_logs"
        and len(call.args) < 3
        and "secrets" not in {keyword.arg for keyword in call.keywords}
    ]
    assert not bare


def test_a_stack_on_a_terminal_shows_no_variables(capfd: pytest.CaptureFixture[str]) -> None:
    configure_logs(style="pretty")
    unknown_to_the_log = LETTERS
    try:
        raise ValueError("no")
    except ValueError:
        structlog.get_logger().exception("failed")
    assert unknown_to_the_log not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SUPABASE_URL", f"https://me:{LETTERS}@x.supabase.co"),
        ("SUPABASE_URL", f"x.supabase.co/{LETTERS}"),
        ("WANDB_BASE_URL", f"https://me:{LETTERS}@wandb.example"),
        ("TRAINER_RUNPOD_API", f"https://me:{LETTERS}@api.runpod.io"),
        ("TRAINER_GATEWAY_KEYS", LETTERS[:15]),
        ("TRAINER_SERVICE_USER_ID", LETTERS),
        ("TRAINER_LEASE_SECONDS", LETTERS),
        ("TRAINER_STORAGE", LETTERS),
        ("TRAINER_TRACKERS", LETTERS),
        ("TRAINER_CHECKPOINTS_IN_STORAGE", LETTERS),
    ],
)
def test_a_setting_that_is_refused_is_not_quoted(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(HostUnfit, match=variable) as unfit:
        load_settings(database_url="postgresql://x", supabase_service_role_key=SecretStr("key"), _env_file=None)
    assert_tells_nothing(str(unfit.value))


@pytest.mark.parametrize(
    "plan",
    [
        f'\'{{"pod": {{"env": {{"KEY": "{LETTERS}"}}}}}}\'',
        f'{{"pod": {{"env": {{"KEY": "{LETTERS}"}}}}',
        f'{{"pod": {{"env": {{"KEY": "{LETTERS}"}}}}, "gpus": "{LETTERS}"}}',
        f"[{LETTERS * 40}]",
    ],
)
def test_a_pod_that_is_refused_is_not_quoted(plan: str) -> None:
    with pytest.raises(HostUnfit, match="TRAINER_FLEET_POD") as unfit:
        read_plan(plan)
    assert_tells_nothing(str(unfit.value))


def test_a_dotenv_that_is_no_utf8_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(f"DATABASE_URL=postgresql://me:{LETTERS}".encode() + b"\xe9@h/app\n")
    for word in ("jobs", "run"):
        said = CommandLine(tmp_path).run(word)
        assert said.status == 78 and ".env" in said.err and "UTF-8" in said.err
        assert_tells_nothing(said.err)
