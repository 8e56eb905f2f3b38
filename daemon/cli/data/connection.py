"""A command's connection: needs only DATABASE_URL, and reports refusals in one line.

Any login with the rights that the command needs will do: the daemon's, the operator's, a read-only one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import dict_row
from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from daemon.cli.errors import CommandFailed
from daemon.database.login import CONNECT_SECONDS, KEEPALIVE, login_fault
from daemon.database.refusal import NOT_MIGRATED, first_line
from daemon.database.url import DatabaseUrlInvalid, is_transaction_pooler, read_database_url
from daemon.errors import DatabaseAway, HostUnfit
from daemon.sentence import as_sentence

Connection = psycopg.Connection[dict[str, Any]]

# A person is waiting.
STATEMENT_SECONDS = 60


class _DatabaseSettings(BaseSettings):
    """The only setting that a command needs if it only reads rows."""

    model_config = SettingsConfigDict(env_file=".env", env_ignore_empty=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr = Field(validation_alias=AliasChoices("DATABASE_URL", "database_url"))


def database_url() -> str:
    """DATABASE_URL from the environment or .env, in a form that libpq accepts. Raises HostUnfit."""
    from daemon.read_settings import dotenv_unreadable
    from daemon.terminal.sanitize import plain

    try:
        url = _DatabaseSettings().database_url.get_secret_value()
    except ValidationError:
        raise HostUnfit(
            "DATABASE_URL is not set: put the Postgres address (Supabase: session pooler, port 5432) "
            "into the environment or a .env file here"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise dotenv_unreadable(error) from None
    try:
        read = read_database_url(url)
    except DatabaseUrlInvalid as error:
        raise HostUnfit(f"DATABASE_URL {error}") from None
    for notice in read.notices:
        sys.stderr.write(f"brightrun-trainer: {as_sentence(f'DATABASE_URL: {plain(notice)}')}\n")
    return read.get_secret_value()


def connect() -> Connection:
    """Opens a connection in autocommit, rows as dicts; the caller closes it. Raises DatabaseAway, HostUnfit."""
    dsn = database_url()
    try:
        connection = psycopg.connect(
            dsn,
            autocommit=True,
            row_factory=dict_row,
            # A transaction pooler may run the next statement in another session.
            prepare_threshold=None,
            connect_timeout=CONNECT_SECONDS,
            application_name="brightrun-trainer cli",
            **KEEPALIVE,
        )
    except psycopg.OperationalError as error:
        raise login_fault(error) from error
    if not is_transaction_pooler(dsn):
        # A watching session is idle between two reads. Not behind a pooler, where the next client would inherit both.
        connection.execute(f"SET statement_timeout = '{STATEMENT_SECONDS}s'; SET idle_session_timeout = 0")
    return connection


@contextmanager
def open_database() -> Iterator[Connection]:
    """Opens one connection for one command; a refusal by Postgres becomes a CommandFailed."""
    connection = connect()
    try:
        with said_plainly():
            yield connection
    finally:
        connection.close()


@contextmanager
def said_plainly() -> Iterator[None]:
    """Turns Postgres' errors into ours: DatabaseAway, HostUnfit (not migrated), CommandFailed (refused)."""
    try:
        yield
    except NOT_MIGRATED as error:
        raise HostUnfit(
            f"the database is not prepared for this version ({first_line(error)}): run `brightrun-trainer migrate`"
        ) from error
    except psycopg.errors.QueryCanceled as error:
        raise CommandFailed(f"the database took longer than {STATEMENT_SECONDS} s and was stopped") from error
    except psycopg.errors.InsufficientPrivilege as error:
        hint = error.diag.message_hint or "use a DATABASE_URL whose login may: training_daemon, or the project's owner"
        raise CommandFailed(f"this login lacks a right: {first_line(error)}", hint) from error
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise DatabaseAway(first_line(error)) from error
    except psycopg.Error as error:
        # Messages of the guard and the functions (PT404, PT409), and of constraints.
        raise CommandFailed(first_line(error), error.diag.message_hint) from error
