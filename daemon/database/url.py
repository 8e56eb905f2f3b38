"""Reads DATABASE_URL in the spelling of any driver and turns it into a connection string that libpq accepts.

A URL that cannot be used gives a one-line error that names the part but never its value: an unescaped `@` or `/` in a
password shifts the rest of the URL, so any part may contain a piece of the password. For the same reason libpq's own
messages, which quote the value, are never passed on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from urllib.parse import quote, unquote_to_bytes

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pydantic import SecretStr

# Where a transaction pooler (Supabase's Supavisor, PgBouncer) usually listens.
TRANSACTION_POOLER_PORT = "6543"

ENCODE = (
    "write special characters percent-encoded (@ as %40, : as %3A, / as %2F, ? as %3F, # as %23, % as %25, "
    "a space as %20, [ as %5B, ] as %5D, & as %26)"
)
_SHAPE = "postgresql://USER:PASSWORD@HOST:5432/DATABASE"
# SQLAlchemy's and JDBC's spellings of the same scheme.
_SCHEME = re.compile(r"(?:jdbc:)?postgres(?:ql)?(?:\+[a-z0-9_]+)?://", re.IGNORECASE)
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,40}")
_PAIR = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s'\\]|\\.)*)(?:\s+|$)", re.DOTALL)
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_HOST = re.compile(r"[A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+(?:%25[A-Za-z0-9._-]+)?\]|%2F[A-Za-z0-9._/%-]*", re.IGNORECASE)
# Placeholders that dashboards and guides write in place of the password.
_PLACEHOLDER = re.compile(
    r"[\[<{(]+[-_ ]*(?:(?:your|my|db|database|project)[-_ ]*)*password[\]>})]+|your[-_]?(?:db|database)?[-_]?password",
    re.IGNORECASE,
)
_LIBPQ = frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())
_NUMBERS = frozenset(
    ("connect_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout")
)
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
# Parameters of other drivers and poolers that libpq does not know. None of them changes where we connect to.
_OTHERS = frozenset(
    {
        # Prisma, Vercel and Supabase's own templates
        "pgbouncer", "connection_limit", "pool_timeout", "socket_timeout", "statement_cache_size", "sslaccept",
        "sslidentity", "schema", "supa", "workaround", "pooled", "single_use_connections", "directurl",
        # node-postgres, postgres.js, Drizzle
        "max", "min", "idle_timeout", "idletimeoutmillis", "connectiontimeoutmillis", "prepare", "uselibpqcompat",
        "query_timeout", "keepalive", "max_lifetime", "debug",
        # SQLAlchemy, asyncpg, Django
        "prepared_statements", "prepared_statement_cache_size", "prepared_statement_name_func", "command_timeout",
        "pool_size", "max_overflow", "pool_recycle", "pool_pre_ping", "timeout", "async_fallback", "conn_max_age",
        "server_settings", "max_cached_statement_lifetime", "max_cacheable_statement_size", "autocommit",
        # Go's pgx and lib/pq
        "pool_max_conns", "pool_min_conns", "pool_max_conn_lifetime", "pool_max_conn_idle_time",
        "pool_health_check_period", "default_query_exec_mode", "statement_cache_capacity",
        "description_cache_capacity", "binary_parameters", "statement_cache_mode", "x-migrations-table",
        # JDBC
        "currentschema", "preparethreshold", "preparedstatementcachequeries", "rewritebatchedinserts", "tcpkeepalive",
        "sockettimeout", "connecttimeout", "logintimeout", "applicationname", "stringtype", "sslfactory",
        "defaultrowfetchsize", "autosave", "targetservertype", "loadbalancehosts",
        # Rails, Ecto, Sequelize, Npgsql
        "pool", "adapter", "encoding", "reaping_frequency", "checkout_timeout", "variables", "advisory_locks",
        "queue_target", "queue_interval", "dialect", "pooling", "maximum_pool_size", "minimum_pool_size",
        # session settings: every connection sets its own
        "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "search_path", "timezone",
    }
)  # fmt: skip


class DatabaseUrlInvalid(ValueError):
    """Names the part that is wrong and how to write it, never its value."""


class DatabaseUrl(SecretStr):
    """A DATABASE_URL that libpq accepts. `get_secret_value` is the connection string.

    `notices` list what was left out; `secrets` are the strings that no output may contain."""

    def __init__(self, dsn: str, notices: tuple[str, ...] = (), secrets: frozenset[str] = frozenset()) -> None:
        super().__init__(dsn)
        self.notices = notices
        self.secrets = secrets | {dsn}


# For commands that read the settings and never connect.
NO_DATABASE = DatabaseUrl("")


def read_database_url(text: str) -> DatabaseUrl:
    """Reads a URL as people paste it: quoted, after `psql`, with parameters of another driver.

    Raises DatabaseUrlInvalid."""
    bare = _unwrapped(text)
    if not bare:
        raise DatabaseUrlInvalid(f"is empty: it needs {_SHAPE}")
    if any(ord(character) < 32 or ord(character) == 127 for character in bare):
        raise DatabaseUrlInvalid("contains a line break or another control character: write it on one line")
    scheme = _SCHEME.match(bare)
    if scheme is not None:
        given, written = _from_url(bare[scheme.end() :])
    elif (pair := _PAIR.match(bare)) is not None and pair[1] in _LIBPQ:
        given, written = _from_pairs(bare), []
    elif re.match(r"https?://", bare, re.IGNORECASE):
        raise DatabaseUrlInvalid(
            f"is a web address, as SUPABASE_URL is: the database's must begin with postgresql:// ({_SHAPE})"
        )
    else:
        raise DatabaseUrlInvalid(f"must begin with postgresql:// ({_SHAPE})")
    _require_whole(given)
    kept, notices = _understood(given)
    try:
        dsn = make_conninfo("", **kept)
    except (psycopg.Error, ValueError):
        raise DatabaseUrlInvalid(f"is not an address that Postgres' library understands: it needs {_SHAPE}") from None
    hidden = [kept[name] for name in ("password", "sslpassword", "oauth_client_secret") if name in kept]
    secrets = {text.strip(), bare, *written, *hidden, *(quote(one, safe="") for one in hidden)}
    # The same secrets as a connection string quotes them.
    secrets |= {one.replace("\\", "\\\\").replace("'", "\\'") for one in hidden}
    return DatabaseUrl(dsn, tuple(notices), frozenset(secret for secret in secrets if secret))


def is_transaction_pooler(dsn: str) -> bool:
    """Whether the port is the usual one of transaction poolers."""
    try:
        ports = str(conninfo_to_dict(dsn).get("port") or "")
    except psycopg.ProgrammingError:
        return False
    return TRANSACTION_POOLER_PORT in ports.split(",")


def _unwrapped(text: str) -> str:
    """Removes what a shell, a .env file or a copied command has put around the URL."""
    before = None
    while before != text:
        before = text
        text = text.strip().strip("\ufeff\u200b").removesuffix(";")
        text = re.sub(r"^(?:export\s+)?DATABASE_URL\s*=\s*|^psql\s+(?:-d\s+)?(?=['\"p])", "", text)
        for quotes in ("''", '""', "``", "“”", "‘’", "<>"):
            if len(text) > 1 and text[0] == quotes[0] and text[-1] == quotes[1]:
                text = text[1:-1]
    return text


def _from_url(rest: str) -> tuple[dict[str, str], list[str]]:
    """The decoded parts of a URL after its scheme, and its secrets as they were written.

    Like libpq, we end the login at the first `@` that comes before a `/`."""
    login, host, written = "", rest, []
    if (at := rest.find("@")) != -1:
        if "/" in rest[:at] or "@" in rest[at + 1 :]:
            raise DatabaseUrlInvalid(f"cannot be split into its parts: in user and password {ENCODE}")
        login, host = rest[:at], rest[at + 1 :]
    host, has_query, query = host.partition("?")
    host, _, database = host.partition("/")
    if "/" in database:
        raise DatabaseUrlInvalid(f"names a database with a slash in it: in password and database {ENCODE}")
    user, _, password = login.partition(":")
    given: dict[str, str] = {}
    for name, word, text in (("user", "user name", user), ("password", "password", password)):
        if text:
            given[name] = _decoded(text, word)
    if password:
        written.append(password)
        _refuse_placeholder(given["password"])
    given |= _hosts(host, has_login=bool(login))
    if database:
        given["dbname"] = _decoded(database, "name of the database")
    if has_query:
        for pair in filter(None, query.split("&")):
            name, is_pair, value = pair.partition("=")
            name = _decoded(name, "name of a parameter").removeprefix("amp;")
            if not is_pair or not _PARAMETER.fullmatch(name):
                raise DatabaseUrlInvalid(f"has something behind its ? that is not name=value: in the password {ENCODE}")
            given[name] = _decoded(value, "value of a parameter")
            if name == "password":
                written.append(value)
    return given, written


def _hosts(text: str, *, has_login: bool) -> dict[str, str]:
    """host and port; several are separated by commas, as libpq expects."""
    hosts, ports = [], []
    for one in text.split(","):
        host, colon, port = one.rpartition(":") if not one.endswith("]") else (one, "", "")
        if not colon:
            host, port = one, ""
        elif not (port.isascii() and port.isdigit() and 0 < int(port) < 65536) and port:
            missing = "" if has_login else "; if it is the password that stands there, its @ and the host are missing"
            raise DatabaseUrlInvalid(f"has a port that is not a number from 1 to 65535{missing}")
        if not _HOST.fullmatch(host):
            raise DatabaseUrlInvalid(
                f"has a host with characters that host names cannot have: in the password {ENCODE}"
            )
        hosts.append(_decoded(host, "host").strip("[]"))
        ports.append(port)
    found = {"host": ",".join(hosts)} if any(hosts) else {}
    return found | ({"port": ",".join(ports)} if any(ports) else {})


def _from_pairs(text: str) -> dict[str, str]:
    """Parses libpq's other notation: host=… user=… password='…'."""
    given: dict[str, str] = {}
    position = 0
    while position < len(text):
        pair = _PAIR.match(text, position)
        if pair is None:
            raise DatabaseUrlInvalid("is not a list of name=value: put a value with spaces or quotes between '…'")
        value = pair[2]
        if value.startswith("'"):
            value = value[1:-1]
        given[pair[1]] = re.sub(r"\\(.)", r"\1", value)
        position = pair.end()
    if "password" in given:
        _refuse_placeholder(given["password"])
    return {name: value for name, value in given.items() if value}


def _decoded(text: str, part: str) -> str:
    if _BAD_PERCENT.search(text):
        raise DatabaseUrlInvalid(f"has a % in its {part} that does not begin a code: {ENCODE}")
    if " " in text:
        raise DatabaseUrlInvalid(f"has a space in its {part}: {ENCODE}")
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise DatabaseUrlInvalid(f"has percent codes in its {part} that are not UTF-8") from None
    if "\0" in decoded:
        raise DatabaseUrlInvalid(f"has a %00 in its {part}, which Postgres never takes")
    return decoded


def _refuse_placeholder(password: str) -> None:
    if _PLACEHOLDER.fullmatch(password):
        raise DatabaseUrlInvalid("still has the placeholder for the password: put the real one there, without brackets")


def _understood(given: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The parameters that libpq accepts, and a notice for each parameter of another driver that was left out."""
    kept: dict[str, str] = {}
    notices: list[str] = []
    for number, (name, value) in enumerate(given.items(), 1):
        match name.lower():
            case "ssl":
                # The name in JDBC, asyncpg and node-postgres.
                kept.setdefault("sslmode", _ssl_mode(value))
            case "sslmode" if value == "no-verify":
                kept["sslmode"] = "require"
                notices.append("sslmode=no-verify is node-postgres' word, taken as sslmode=require")
            case "sslmode":
                kept["sslmode"] = _ssl_mode(value)
            case "schema" | "search_path" | "currentschema" if value != "public":
                notices.append(f"the parameter {name} is left out: the tables are always looked for in schema public")
            case lower if lower in _LIBPQ:
                kept[lower] = _number(lower, value) if lower in _NUMBERS else value
            case lower if lower in _OTHERS:
                notices.append(f"the parameter {name} is another driver's and is left out")
            case lower:
                raise DatabaseUrlInvalid(_unknown(number - sum(part in given for part in _PARTS), lower))
    return kept, notices


def _unknown(number: int, name: str) -> str:
    """Describes an unknown parameter by its position: its name may be the rest of a password."""
    close = get_close_matches(name, _LIBPQ, n=1)
    meant = f"is it meant to be {close[0]}?" if close else "correct it or leave it out"
    return f"has a parameter that no driver knows (number {number}): {meant}"


def _ssl_mode(value: str) -> str:
    known = {"true": "require", "1": "require", "on": "require", "false": "disable", "0": "disable", "off": "disable"}
    mode = known.get(value.lower(), value)
    if mode not in _SSL_MODES:
        raise DatabaseUrlInvalid(f"has an unknown sslmode: it must be one of {', '.join(_SSL_MODES)}")
    return mode


def _number(name: str, value: str) -> str:
    if not re.fullmatch(r"-?[0-9]{1,9}", value):
        raise DatabaseUrlInvalid(f"has a {name} that is not a number")
    return value


def _require_whole(given: Mapping[str, str]) -> None:
    """Requires the parts that libpq would take from PG* variables or guess (the user as database, a local socket)."""
    if "service" in given:
        return
    missing = {
        name
        for name, variables in _NEEDED.items()
        if name not in given and not any(os.environ.get(variable) for variable in variables)
    }
    if "host" in missing and "hostaddr" not in given:
        raise DatabaseUrlInvalid(f"names no host: it needs {_SHAPE}")
    if given.keys() <= {"host"}:
        # libpq finds everything else in its own variables and files.
        return
    if "dbname" in missing:
        raise DatabaseUrlInvalid("names no database: end it with one, /postgres on Supabase")
    if "user" in missing and not given.get("host", "").startswith(("/", "@")):
        raise DatabaseUrlInvalid(f"names no user: it needs {_SHAPE}")


_NEEDED = {
    "host": ("PGHOST", "PGHOSTADDR", "PGSERVICE"),
    "dbname": ("PGDATABASE", "PGSERVICE"),
    "user": ("PGUSER", "PGSERVICE"),
}
# The parts of a URL before its parameters.
_PARTS = ("user", "password", "host", "port", "dbname")
