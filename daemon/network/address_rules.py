"""Decides which addresses a user's URL may lead to.

A tenant writes a dataset or callback URL and a host inside our network fetches it, so there are rules.
Only https to public addresses. The name is resolved once, each of its addresses is checked, and the
connection goes to a checked address (with the name for TLS and Host), so that a second DNS answer cannot
change the target. Every redirect is checked again. The operator's exceptions are TRAINER_ALLOWED_HOSTS
and the project's own SUPABASE_URL.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

import httpx

from daemon.errors import TrainerError
from daemon.network.endpoint_client import DEFAULT_PORTS
from daemon.network.pinned_client import Target
from daemon.network.public_addresses import Address, is_public
from daemon.settings import Settings

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

# Names that mean this machine, this network or a cloud's metadata service, whatever DNS says about them.
_LOCAL_NAMES = re.compile(r"(^|\.)(localhost|local|localdomain|internal|intranet|lan|home\.arpa|metadata)$")
# A name whose last label is a number is an IPv4 address to many parsers: 2130706433, 0x7f.1, 017700000001.
_ENDS_IN_A_NUMBER = re.compile(r"(^|\.)(\d+|0[xX][0-9a-fA-F]*)$")
_CANONICAL_IPV4 = re.compile(r"^(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}$")
_HOST_NAME = re.compile(r"^(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*$")


class AddressRefused(TrainerError):
    """The rules forbid this URL. The message names the host and the reason, never the path or the query."""


class AddressUnknown(TrainerError):
    """The name cannot be resolved now; another attempt may find it."""


class AddressRules:
    """The rules above, with the operator's exceptions.

    `allowed_hosts` holds "host" (any port) or "host:port"; those may be private and may use plain http.
    """

    def __init__(self, allowed_hosts: Sequence[str] = (), resolve: Resolver | None = None) -> None:
        self._allowed = frozenset(_normal_exception(entry) for entry in allowed_hosts)
        self._resolve = resolve or resolve_name

    async def check(self, url: str) -> Target:
        """Checks one URL. Raises AddressRefused or AddressUnknown."""
        parsed, host, port = _parse(url)
        excepted = host in self._allowed or f"{host}:{port}" in self._allowed
        if parsed.scheme == "http" and not excepted:
            raise AddressRefused(f"the URL of {host} is not https, and only https URLs are accepted")
        literal = _literal(host)
        if literal is None and not excepted and (_LOCAL_NAMES.search(host) or "." not in host):
            raise AddressRefused(f"the name {host} belongs to a private network")
        addresses = [literal] if literal else await self._addresses(host, port)
        # All of them, not only the one we would use: a name with one private address is an attack or a mistake.
        for address in addresses:
            if not excepted and not is_public(address):
                raise AddressRefused(f"the name {host} resolves to {address}, which is not a public address")
        return Target(parsed, host, port, _preferred(addresses))

    async def _addresses(self, host: str, port: int) -> list[Address]:
        try:
            found = await self._resolve(host, port)
            addresses = [ip_address(text.partition("%")[0]) for text in found]
        except (OSError, ValueError) as error:
            raise AddressUnknown(f"the name {host} cannot be resolved ({error})") from error
        if not addresses:
            raise AddressUnknown(f"the name {host} has no address")
        return addresses


def rules_from(settings: Settings, resolve: Resolver | None = None) -> AddressRules:
    """The rules with the operator's exceptions: TRAINER_ALLOWED_HOSTS, and SUPABASE_URL with exactly its port."""
    return AddressRules([*settings.allowed_hosts, *own_hosts(settings)], resolve)


def own_hosts(settings: Settings) -> tuple[str, ...]:
    """`host:port` of the project's API and, for a hosted project, of its edge functions."""
    if settings.supabase_url is None:
        return ()
    url = httpx.URL(settings.supabase_url)
    port = url.port or DEFAULT_PORTS.get(url.scheme, 443)
    project, _, domain = url.host.partition(".")
    functions = (f"{project}.functions.{domain}:{port}",) if domain in ("supabase.co", "supabase.in") else ()
    return (f"{url.host}:{port}", *functions)


def redact(url: str) -> str:
    """The parts of a URL that may be shown: scheme, host and path. Query, fragment and user info can hold secrets."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an unreadable URL"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


async def resolve_name(host: str, port: int) -> list[str]:
    """Asks the system's resolver, outside the event loop."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _parse(url: str) -> tuple[httpx.URL, str, int]:
    if any(ord(character) <= 32 or ord(character) == 127 for character in url) or "\\" in url:
        raise AddressRefused("the URL contains blanks, control characters or backslashes")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii").lower().strip("[]")
    except (httpx.InvalidURL, UnicodeError, ValueError, TypeError) as error:
        raise AddressRefused("the URL cannot be read") from error
    if parsed.scheme not in DEFAULT_PORTS:
        raise AddressRefused(f"the URL begins with {parsed.scheme or 'no scheme'}, and only https URLs are accepted")
    if parsed.userinfo:
        raise AddressRefused(f"the URL of {host} contains a user name or a password, which is not allowed")
    host = host[:-1] if host.endswith(".") else host
    if not host:
        raise AddressRefused("the URL names no host")
    port = DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
    if not 0 < port < 65536:
        raise AddressRefused(f"the URL of {host} names the port {port}, which does not exist")
    return parsed.copy_with(host=host, fragment=None), host, port


def _literal(host: str) -> Address | None:
    """The address if the host is one, None for a name. Raises AddressRefused for unusual spellings."""
    if ":" in host:
        if "%" in host:
            raise AddressRefused(f"the address {host} has a zone, which makes it local")
        try:
            return IPv6Address(host)
        except ValueError as error:
            raise AddressRefused(f"the host {host} is not an IPv6 address") from error
    if _CANONICAL_IPV4.fullmatch(host):
        try:
            return IPv4Address(host)
        except ValueError as error:
            raise AddressRefused(f"the host {host} is not an IPv4 address") from error
    if _ENDS_IN_A_NUMBER.search(host):
        raise AddressRefused(f"the host {host} is not four decimal numbers, as an IPv4 address must be")
    if not _HOST_NAME.fullmatch(host):
        raise AddressRefused(f"{host!r} is not a host name")
    return None


def _preferred(addresses: Sequence[Address]) -> Address:
    # IPv4 first: pods often resolve IPv6 addresses that they cannot reach.
    return min(addresses, key=lambda address: address.version)


def _normal_exception(entry: str) -> str:
    entry = entry.strip().lower()
    # A bare IPv6 address has several colons and no port; [::1]:8080 has both.
    return entry.replace("[", "").replace("]", "") if entry.startswith("[") else entry
