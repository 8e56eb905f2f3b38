"""Verifies a callback as a receiver does: with the library of Standard Webhooks, not a verifier of our own."""

from __future__ import annotations

from collections.abc import Mapping

from standardwebhooks import Webhook, WebhookVerificationError

NotSigned = WebhookVerificationError


def verify(secret: str, headers: Mapping[str, str], body: bytes) -> None:
    """Raises NotSigned unless this exact message was signed with the secret, at most five minutes ago."""
    Webhook(secret).verify(body, dict(headers))
