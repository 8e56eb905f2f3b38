"""The Python verification of the docs, run against messages that the daemon signed."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from pydantic import SecretStr

from daemon.report.webhook import message_body, signed_headers, signing_keys
from tests.paths import ROOT

DOCS = ROOT / "docs"
PAGE = (DOCS / "for-app-developers.md").read_text()
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER_SECRET = "whsec_" + base64.b64encode(bytes(range(32, 64))).decode()
PAYLOAD = {"job_id": "j", "event": "job.failed", "sequence": 8, "error_message": "Grüße, 你好"}

Verify = Callable[[bytes, Mapping[str, str], str], dict[str, Any]]


@pytest.fixture(scope="module")
def verify() -> Verify:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(snippet, "for-app-developers.md", "exec"), names)
    function: Verify = names["verify_callback"]
    return function


def sent(*secrets: str, at: float | None = None) -> tuple[bytes, dict[str, str]]:
    body = message_body(PAYLOAD)
    keys = signing_keys([SecretStr(secret) for secret in secrets])
    return body, signed_headers(keys, "msg-1", int(time.time() if at is None else at), body)


def test_it_accepts_what_the_daemon_signed(verify: Verify) -> None:
    body, headers = sent(SECRET)
    assert verify(body, headers, SECRET) == PAYLOAD
    # Servers write header names as they like.
    assert verify(body, {name.title(): value for name, value in headers.items()}, SECRET) == PAYLOAD


def test_it_accepts_either_secret_while_they_are_changed(verify: Verify) -> None:
    body, headers = sent(OTHER_SECRET, SECRET)
    assert verify(body, headers, SECRET) == verify(body, headers, OTHER_SECRET) == PAYLOAD


def test_it_refuses_what_was_tampered_with(verify: Verify) -> None:
    body, headers = sent(SECRET)
    for forged_body, forged_headers, secret in (
        (body.replace(b"failed", b"completed"), headers, SECRET),
        (body, headers | {"webhook-id": "msg-2"}, SECRET),
        (body, headers | {"webhook-signature": "v1,"}, SECRET),
        (body, headers | {"webhook-signature": "v1,ü"}, SECRET),
        (body, headers, OTHER_SECRET),
    ):
        with pytest.raises(ValueError, match="wrong signature"):
            verify(forged_body, forged_headers, secret)


def test_it_refuses_what_is_old_or_unsigned(verify: Verify) -> None:
    body, headers = sent(SECRET, at=time.time() - 3600)
    with pytest.raises(ValueError, match="signed too long ago"):
        verify(body, headers, SECRET)
    with pytest.raises(ValueError, match="not a signed callback"):
        verify(*sent(), SECRET)


def test_the_message_shown_has_the_fields_of_the_reference() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    reference = (DOCS / "reference" / "schema.md").read_text()
    (fields,) = re.findall(r"<!-- payload -->\n(.*?)<!-- /payload -->", reference, re.DOTALL)
    assert set(json.loads(shown)) == set(re.findall(r"^\| `(\w+)` \|", fields, re.MULTILINE))
