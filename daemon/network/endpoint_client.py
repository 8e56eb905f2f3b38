"""Keeps a credential at the endpoint that was configured for it. All our clients that hold one follow this rule.

A request with a secret goes to the scheme, host and port of a configured address, whatever a server answers: redirects
are not followed, and of an address that a server names, only path and query are used. A server behind a TLS proxy
builds its addresses from what the proxy tells it, and may say http:// of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import httpx

from daemon.errors import TrainerError

DEFAULT_PORTS = {"https": 443, "http": 80}
_HUB = "https://huggingface.co"
# What holds the hub's token, or stands for it.
_SECRET_HEADERS = ("authorization", "cookie")
# In these a server names addresses that the hub's client, and the library beneath it, would call with the token.
_NAMING_HEADERS = ("link", "x-xet-refresh-route")


class CredentialWithheld(TrainerError):
    """A request with a credential would have left for an address that nobody configured. It was not sent."""


class Origin(NamedTuple):
    """Where a request goes. A credential belongs to one."""

    scheme: str
    host: str
    port: int | None


def origin_of(url: str | httpx.URL) -> Origin:
    parsed = httpx.URL(str(url))
    return Origin(parsed.scheme, parsed.host.rstrip("."), parsed.port or DEFAULT_PORTS.get(parsed.scheme))


def endpoint_client(*endpoints: str, timeout: httpx.Timeout | float) -> httpx.AsyncClient:
    """Creates a client whose requests reach these endpoints and nothing else. The caller closes it.

    Raises CredentialWithheld from a request to any other scheme, host or port."""
    allowed = frozenset(origin_of(endpoint) for endpoint in endpoints)

    async def stay(request: httpx.Request) -> None:
        if origin_of(request.url) not in allowed:
            raise CredentialWithheld(
                f"a request with a credential was to go to {request.url.scheme}://{request.url.host}, "
                "which is not the configured address; it was not sent"
            )

    async def forget_redirect(response: httpx.Response) -> None:
        # httpx reads it even when it does not follow it, and raises InvalidURL for one that it cannot read.
        if response.is_redirect:
            response.headers.pop("location", None)

    # Hooks, not a transport: with a transport of its own a client ignores the proxy that the operator has set.
    hooks: dict[str, list[Callable[[Any], Any]]] = {"request": [stay], "response": [forget_redirect]}
    return httpx.AsyncClient(timeout=timeout, follow_redirects=False, event_hooks=hooks)


def at_endpoint(endpoint: str, location: str) -> str:
    """Returns the address that a server names, moved to the endpoint: only its path and query are used.

    Raises ValueError when it names no path."""
    # A browser reads \ as /, and so may whoever wrote this.
    named = urlsplit(urljoin(endpoint, location.strip().replace("\\", "/")))
    if not named.path.strip("/"):
        raise ValueError("it names no path")
    target = f"{named.path}?{named.query}" if named.query else named.path
    try:
        return str(httpx.URL(endpoint).copy_with(raw_path=target.encode("ascii")))
    except httpx.InvalidURL as error:
        raise ValueError("it cannot be read") from error


def beneath_endpoint(endpoint: str, location: str) -> str:
    """Like at_endpoint, for what was created there: it lies under the endpoint's own path.

    A server that does not know under which prefix its proxy serves it names a shorter path: its last part is the id."""
    moved = httpx.URL(at_endpoint(endpoint, location))
    base = httpx.URL(endpoint).raw_path.decode("ascii").rstrip("/")
    path, mark, query = moved.raw_path.decode("ascii").partition("?")
    if not path.startswith(f"{base}/"):
        path = f"{base}/{path.rstrip('/').rpartition('/')[2]}"
    return str(moved.copy_with(raw_path=f"{path}{mark}{query}".encode()))


def hub_hooks(endpoint: str) -> dict[str, list[Callable[[Any], None]]]:
    """Hooks for the hub's own client, which follows redirects to file servers: they take credentials off elsewhere.

    An answer may also name addresses that are then called with the token (the next page, a download token): those that
    lead elsewhere are removed. The client is httpx2's, whose types are those of httpx under another name."""
    # A mirror passes requests for private models on to the hub, which issued the token.
    homes = frozenset({origin_of(endpoint), origin_of(_HUB)})

    def take_off(request: Any) -> None:
        if origin_of(str(request.url)) not in homes:
            for name in _SECRET_HEADERS:
                request.headers.pop(name, None)

    def forget_foreign(response: Any) -> None:
        links = response.links
        named = [links[name]["url"] for name in ("next", "xet-auth") if name in links]
        named += [response.headers[name] for name in ("x-xet-refresh-route",) if name in response.headers]
        if not all(_leads_home(url, str(response.url), homes) for url in named):
            for name in _NAMING_HEADERS:
                response.headers.pop(name, None)

    return {"request": [take_off], "response": [forget_foreign]}


def _leads_home(url: str, base: str, homes: frozenset[Origin]) -> bool:
    try:
        return origin_of(httpx.URL(base).join(url)) in homes
    except httpx.InvalidURL:
        return False
