"""What a receiver does with a callback: the library of Standard Webhooks judges it, not a verifier of our own."""

from __future__ import annotations

from collections.abc import Mapping

from standardwebhooks import Webhook, WebhookVerificationError

NotSigned = WebhookVerificationError


def verify(secret: str, headers: Mapping[str, str], body: bytes) -> None:
    """Raises NotSigned unless this very message was signed with the secret, at most five minutes ago."""
    Webhook(secret).verify(body, dict(headers))
