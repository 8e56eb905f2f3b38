"""A message is signed as Standard Webhooks say, and fits."""

from __future__ import annotations

import base64
import json

import pytest
from pydantic import SecretStr

from daemon.errors import HostUnfit
from daemon.report.webhook import MAX_BODY_BYTES, SignatureInvalid, message_body, signed_headers, signing_keys, verify

SECRET = "whsec_" + base64.b64encode(b"k" * 24).decode()
NEWER = "whsec_" + base64.b64encode(b"n" * 32).decode()


def test_a_signature_is_the_one_of_the_specifications_example() -> None:
    # From the Standard Webhooks reference implementations' tests.
    keys = signing_keys([SecretStr("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")])
    headers = signed_headers(keys, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-id"] == "msg_p5jXN8AQM9LWM0D4loKWxJek"
    assert headers["webhook-timestamp"] == "1614265330"


def test_a_receiver_with_either_secret_can_verify_while_they_are_changed() -> None:
    both = signing_keys([SecretStr(NEWER), SecretStr(SECRET)])
    headers = signed_headers(both, "id", 1_000_000, b"{}")
    for secret in (SECRET, NEWER):
        verify(signing_keys([SecretStr(secret)]), headers, b"{}", now=1_000_010)


@pytest.mark.parametrize(
    ("body", "now", "changes"),
    [
        (b"{ }", 1_000_000, {}),
        (b"{}", 1_000_301, {}),
        (b"{}", 999_699, {}),
        (b"{}", 1_000_000, {"webhook-id": "other"}),
        (b"{}", 1_000_000, {"webhook-timestamp": "1000001"}),
        (b"{}", 1_000_000, {"webhook-timestamp": "soon"}),
        (b"{}", 1_000_000, {"webhook-signature": "v1,AAAA"}),
        (b"{}", 1_000_000, {"webhook-signature": ""}),
    ],
)
def test_whatever_was_changed_is_noticed(body: bytes, now: float, changes: dict[str, str]) -> None:
    keys = signing_keys([SecretStr(SECRET)])
    headers = {**signed_headers(keys, "id", 1_000_000, b"{}"), **changes}
    with pytest.raises(SignatureInvalid):
        verify(keys, headers, body, now)


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
