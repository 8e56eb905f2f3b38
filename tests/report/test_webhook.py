"""A message is signed as Standard Webhooks say, and fits."""

from __future__ import annotations

import base64
import json
import time
from datetime import UTC, datetime

import pytest
from pydantic import SecretStr
from standardwebhooks import Webhook

from daemon.errors import HostUnfit
from daemon.report.webhook import MAX_BODY_BYTES, message_body, signed_headers, signing_keys
from tests.doubles.standard_webhooks import NotSigned, verify

SECRET = "whsec_" + base64.b64encode(b"k" * 24).decode()
NEWER = "whsec_" + base64.b64encode(b"n" * 32).decode()


def test_a_signature_is_the_one_of_the_specifications_example() -> None:
    # From the Standard Webhooks reference implementations' tests.
    keys = signing_keys([SecretStr("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")])
    headers = signed_headers(keys, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert headers["webhook-timestamp"] == "1614265330"


@pytest.mark.parametrize("body", [b"{}", '{"note":"größer 😀"}'.encode(), b'{"a":1}\n'])
def test_the_specifications_library_signs_the_same(body: bytes) -> None:
    now = datetime.now(UTC)
    headers = signed_headers(signing_keys([SecretStr(SECRET)]), "an.id-1", int(now.timestamp()), body)
    assert headers["webhook-signature"] == Webhook(SECRET).sign("an.id-1", now, body.decode())


def test_a_receiver_with_either_secret_can_verify_while_they_are_changed() -> None:
    both = signing_keys([SecretStr(NEWER), SecretStr(SECRET)])
    headers = signed_headers(both, "id", int(time.time()), b"{}")
    for secret in (SECRET, NEWER):
        verify(secret, headers, b"{}")
    with pytest.raises(NotSigned):
        verify("whsec_" + base64.b64encode(b"x" * 24).decode(), headers, b"{}")


@pytest.mark.parametrize(
    ("body", "signed_seconds_ago", "changes"),
    [
        (b"{ }", 0, {}),
        (b"{}", 310, {}),
        (b"{}", -310, {}),
        (b"{}", 0, {"webhook-id": "other"}),
        (b"{}", 0, {"webhook-timestamp": "soon"}),
        (b"{}", 0, {"webhook-signature": "v1,AAAA"}),
        (b"{}", 0, {"webhook-signature": ""}),
    ],
)
def test_whatever_was_changed_is_noticed(body: bytes, signed_seconds_ago: int, changes: dict[str, str]) -> None:
    keys = signing_keys([SecretStr(SECRET)])
    headers = signed_headers(keys, "id", int(time.time()) - signed_seconds_ago, b"{}")
    if body == b"{}" and abs(signed_seconds_ago) < 300:
        verify(SECRET, headers, body)
    with pytest.raises(NotSigned):
        verify(SECRET, {**headers, **changes}, body)


def test_a_message_that_is_sent_again_later_under_a_newer_time_is_noticed() -> None:
    now = int(time.time())
    headers = signed_headers(signing_keys([SecretStr(SECRET)]), "id", now - 200, b"{}")
    with pytest.raises(NotSigned):
        verify(SECRET, {**headers, "webhook-timestamp": str(now)}, b"{}")


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_not base64!", "whsec_c2hvcnQ=", "plain words"])
def test_an_unusable_secret_is_named_by_its_place_and_not_by_its_value(secret: str) -> None:
    with pytest.raises(HostUnfit, match="entry 2") as raised:
        signing_keys([SecretStr(SECRET), SecretStr(secret)])
    assert not secret or secret not in str(raised.value).replace("whsec_ and", "").replace("whsec_$", "")


def test_a_body_that_is_too_long_gives_up_what_is_not_decided_by() -> None:
    payload = {
        "job_id": "j", "event": "job.failed", "sequence": 7, "status": "failed",
        "error_message": "m" * 30_000, "error_stack": "s" * 30_000, "metrics": {str(n): n for n in range(5000)},
    }  # fmt: skip
    body = message_body(payload)
    assert len(body) <= MAX_BODY_BYTES
    sent = json.loads(body)
    assert {key: sent[key] for key in ("job_id", "event", "sequence", "status")} == {
        "job_id": "j", "event": "job.failed", "sequence": 7, "status": "failed",
    }  # fmt: skip
    assert sent["truncated"] == ["error_stack", "metrics", "error_message"]
    assert sent["error_message"].startswith("mmm")


def test_a_body_that_fits_is_sent_as_it_is() -> None:
    assert json.loads(message_body({"status": "running", "note": "größer"})) == {"status": "running", "note": "größer"}
