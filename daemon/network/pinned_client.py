"""An HTTP client that connects to exactly the address that was checked."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from daemon.network.public_addresses import Address


@dataclass(frozen=True)
class Target:
    """A URL that passed the check, with the one address that a connection may use."""

    url: httpx.URL
    host: str
    port: int
    address: Address

    def request(
        self,
        client: httpx.AsyncClient,
        method: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Request:
        """A request that connects to `address` but names `host` in TLS and in its Host header."""
        return client.build_request(
            method,
            self.url.copy_with(host=str(self.address)),
            headers={**(headers or {}), "Host": self.url.netloc.decode("ascii")},
            content=content,
            extensions={"sni_hostname": self.host},
        )


def guarded_client(timeout: httpx.Timeout, tls: ssl.SSLContext | None = None) -> httpx.AsyncClient:
    """Creates a client for pinned requests. The caller closes it.

    It uses no proxy from the environment (which would connect to an address that we did not check), follows
    no redirect, keeps no cookie, and reuses no connection: two names on one address must not share a
    connection that was authenticated for one of them.
    """
    return httpx.AsyncClient(
        timeout=timeout,
        verify=tls or httpx.create_ssl_context(),
        trust_env=False,
        follow_redirects=False,
        cookies=CookieJar(policy=DefaultCookiePolicy(allowed_domains=())),
        limits=httpx.Limits(max_keepalive_connections=0, max_connections=None),
    )
