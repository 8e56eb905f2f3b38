"""What is read from a key before it is used."""

from __future__ import annotations

import pytest

from daemon.storage.service_key import key_fault
from tests.doubles.storage_keys import ANON_KEY, PUBLISHABLE_KEY, SECRET_KEY, SERVICE_KEY, make_key

PROJECT = "https://abcdefghijklmnopqrst.supabase.co"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (PUBLISHABLE_KEY, "is the publishable key"),
        (ANON_KEY, "is the anon key"),
        (make_key("authenticated"), "is the authenticated key"),
        (make_key("service_role", ref="zyxwvutsrqponmlkjihg"), "of the project zyxwvutsrqponmlkjihg"),
        (make_key("service_role", exp=1767225600), "has expired on 2026-01-01"),
        (make_key("service_role", exp=-1e300), "has expired;"),
    ],
)
def test_a_key_that_cannot_serve_is_named_and_never_quoted(key: str, said: str) -> None:
    fault = key_fault(PROJECT, key)
    assert fault is not None and said in fault and "Settings, API Keys" in fault
    assert key not in fault


@pytest.mark.parametrize(
    "key",
    [
        SERVICE_KEY,
        SECRET_KEY,
        make_key("service_role", ref="abcdefghijklmnopqrst"),
        make_key("training_host"),
        "no.jwt.atall",
        "a..b",
        "....",
        "",
    ],
)
def test_a_key_that_may_serve_is_left_to_the_server(key: str) -> None:
    assert key_fault(PROJECT, key) is None


def test_on_a_domain_of_ones_own_the_project_is_not_compared() -> None:
    assert key_fault("https://db.example.org", make_key("service_role", ref="zyxwvutsrqponmlkjihg")) is None
