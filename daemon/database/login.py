"""Decides whether a failed login is an outage, which passes, or a fault that a person must fix.

A connection that was never made has no SQLSTATE, so this compares the messages of Postgres, its poolers and libpq.
It applies only before the first success: later, a pooler may report any error while its database restarts.
"""

from __future__ import annotations

import re
from typing import Any

import psycopg
from psycopg.rows import TupleRow

from daemon.errors import DatabaseAway, HostUnfit

CONNECT_SECONDS = 10
# A dead peer is noticed in about 25 s, also while a statement waits for its answer.
KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
}
_NETWORK = "Supabase: Database settings, Network Restrictions; elsewhere: pg_hba.conf"
_CERTIFICATE = "put the server's CA certificate into a file and name it by sslrootcert=…, or take sslmode=require"
# The first match counts. Messages of Supavisor, PgBouncer and Postgres for the same fault are together.
_FOR_GOOD: tuple[tuple[str, str], ...] = (
    (
        r"tenant or user not found|\(ENOTFOUND\)|\(ENOIDENTIFIER\)|no tenant identifier",
        "the pooler knows no such project: the user must be ROLE.PROJECT and the host that of the project's region; "
        "copy the session pooler's address from the dashboard (Connect), and restore the project if it is paused",
    ),
    (r"\(EBANNED\)|tenant is banned", "the project is blocked: see the dashboard"),
    (
        r"allow_list|pg_hba\.conf rejects",
        f"this host's address is not allowed: add it ({_NETWORK})",
    ),
    (
        r"no pg_hba\.conf entry.*no encryption",
        f"the server lets this login in by TLS only, or not from here: add sslmode=require, or allow the address "
        f"({_NETWORK})",
    ),
    (r"no pg_hba\.conf entry", f"the server does not let this login in from here: allow the address ({_NETWORK})"),
    (r"SSL connection is required|SSL required|\(ESSLREQUIRED\)", "the server wants TLS: add sslmode=require"),
    (
        r"server does not support SSL",
        "the server has no TLS and sslmode asks for it: turn it on there, or take sslmode=disable on a trusted network",
    ),
    (r"certificate verify failed|root certificate file", _CERTIFICATE),
    (
        r"server certificate for .* does not match host name",
        "sslmode=verify-full needs the host name of the certificate",
    ),
    (r"(?:certificate|private key) file", "correct sslcert and sslkey"),
    (
        r"password authentication failed|wrong password|SASL authentication failed|no password supplied"
        r"|\(EWRONGPASSWORD\)|auth(?:entication)? failed",
        "check user and password; in the address the password is percent-encoded and without the brackets of a "
        "placeholder",
    ),
    (r'database "[^"]*" does not exist|no such database', "correct the database's name; on Supabase it is postgres"),
    (r'role "[^"]*" does not exist|no such user', "correct the user's name, or create the role"),
    (r"is not permitted to log in", "ALTER ROLE … LOGIN PASSWORD '…'"),
    (r"permission denied for database", "GRANT CONNECT ON DATABASE … to this login"),
    (r"unsupported startup parameter", "the pooler refuses a parameter: leave options=… out of the address"),
    (
        r"received invalid response to SSL negotiation|expected authentication request from server",
        "what answers at this host and port is no Postgres: correct the port, 5432 as a rule",
    ),
    (r"connection is bad: (?:invalid|unrecognized|unsupported|could not parse)", "correct the address"),
    (r"service file|definition of service", "correct the service that the address names"),
)
_IPV6_ONLY = (
    "the host has an IPv6 address only and this machine has no IPv6: use the session pooler's address (Supabase: "
    "Connect, Session pooler, port 5432), or buy the IPv4 add-on"
)
_WAITING: tuple[tuple[str, str], ...] = (
    (
        r"too many (?:clients|connections)|connection slots are reserved|max clients|max client connections"
        r"|no more connections allowed|\(EMAXCLIENT",
        "this passes when others disconnect; if it lasts, raise the pool size or the limit of connections",
    ),
    (
        r"failed to resolve host|could not translate host name|Name or service not known|No address associated",
        "check the host's name in DATABASE_URL and the DNS of this machine; a paused project's own name vanishes",
    ),
    (r"\(ECIRCUITBREAKER\)", "the pooler refuses every login for a while after too many failures: check the password"),
)
_UNREACHABLE = re.compile(r"Network is unreachable|Cannot assign requested address")
_ATTEMPT = re.compile(r'(?:at|host(?:addr)?:) "?\'?(?P<address>[0-9A-Fa-f:.]+)"?\'?')


def login_fault(error: psycopg.Error | OSError) -> DatabaseAway | HostUnfit:
    """Turns a failed connection into one line that says what is wrong and what to do."""
    text = str(error).strip()
    reason = login_reason(text) or type(error).__name__
    if advice := _advice(text, _FOR_GOOD):
        return HostUnfit(f"DATABASE_URL is refused: {reason}: {advice}")
    if _is_ipv6_only(text):
        return HostUnfit(f"DATABASE_URL cannot be reached: {reason}: {_IPV6_ONLY}")
    advice = _advice(text, _WAITING)
    return DatabaseAway(f"{reason}: {advice}" if advice else reason)


def login_reason(text: str) -> str:
    """The first line of libpq's message, which has a line for each address that it tried."""
    line = text.strip().partition("\n")[0]
    return line.removeprefix("connection failed: ").removeprefix("connection is bad: ")


def connect(dsn: str, *, application_name: str, **parameters: Any) -> psycopg.Connection[TupleRow]:
    """Opens a connection in autocommit, rows as tuples. Raises DatabaseAway or HostUnfit."""
    try:
        return psycopg.connect(
            dsn,
            autocommit=True,
            # A transaction pooler may run the next statement in another session.
            prepare_threshold=None,
            connect_timeout=CONNECT_SECONDS,
            application_name=application_name,
            **parameters,
        )
    except psycopg.OperationalError as error:
        raise login_fault(error) from error


def _advice(text: str, known: tuple[tuple[str, str], ...]) -> str | None:
    for words, advice in known:
        if re.search(words, text, re.IGNORECASE | re.MULTILINE):
            return advice
    return None


def _is_ipv6_only(text: str) -> bool:
    """Whether all addresses that were tried are IPv6, and this machine has no IPv6 route."""
    tried = [address for found in _ATTEMPT.finditer(text) if set(address := found["address"]) & {".", ":"}]
    return bool(_UNREACHABLE.search(text)) and bool(tried) and all(":" in address for address in tried)
