"""What every process of ours that talks to the hub shares: what it inherits from us, and where its token may go."""

from __future__ import annotations

import os
import re

from daemon.network.endpoint_client import hub_hooks

# What such a process needs from our environment; none of it is secret.
_INHERITED = re.compile(r"^(PATH|HOME|LANG|LC_.*|TMPDIR|PYTHONPATH|VIRTUAL_ENV|HF_ENDPOINT|HF_HUB_.*|SSL_CERT_.*"
                        r"|HTTPS?_PROXY|NO_PROXY|https?_proxy|no_proxy)$")  # fmt: skip


def hub_environment() -> dict[str, str]:
    """Returns the environment for a process that is handed its token on stdin."""
    return {key: value for key, value in os.environ.items() if _INHERITED.match(key)}


def keep_token_at_the_hub(timeout_seconds: float | None = None) -> None:
    """In that process: the hub's own client takes the token off every request that leaves the hub.

    The timeout is that of one read or write."""
    from huggingface_hub import constants, get_session, set_client_factory

    usual, hooks = get_session(), hub_hooks(constants.ENDPOINT)
    merged = {name: [*usual.event_hooks[name], *hooks[name]] for name in hooks}
    # A factory: the library makes a new client when a connection has failed.
    set_client_factory(lambda: type(usual)(event_hooks=merged, follow_redirects=True, timeout=timeout_seconds))
