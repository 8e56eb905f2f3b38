"""One rule for every HTTP client of ours: which answers pass by themselves, and what is said of a page."""

from __future__ import annotations

import httpx
import pytest

from daemon.network.retry_after import is_page, is_transient, said_by_page
from daemon.pod import runpod_api
from daemon.pod.runpod_api import ApiFault


@pytest.mark.parametrize("status", [408, 423, 425, 429, 500, 502, 503, 504, *range(520, 528), 530, 544, 598])
def test_what_passes_by_itself_is_asked_again(status: int) -> None:
    assert is_transient(status)
    assert runpod_api._fault(status, "no words") is ApiFault.AWAY


@pytest.mark.parametrize("status", [200, 301, 400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 451, 501, 505])
def test_what_is_said_each_time_is_not(status: int) -> None:
    assert not is_transient(status)


@pytest.mark.parametrize(
    ("kind", "body", "page"),
    [
        ("text/html; charset=UTF-8", "anything", True),
        ("TEXT/HTML", "", True),
        ("application/json", "  <!DOCTYPE html><html>", True),
        ("", "<html><body>", True),
        ("application/json", '{"message": "<html>"}', False),
        ("text/plain", "Bucket not found", False),
    ],
)
def test_a_page_is_known_by_its_type_or_its_beginning(kind: str, body: str, page: bool) -> None:
    assert is_page(httpx.Response(520, headers={"Content-Type": kind}, content=body)) is page
    assert "<" not in said_by_page(520) and "520" in said_by_page(520)


def test_runpods_page_is_told_by_its_status() -> None:
    answer = httpx.Response(502, headers={"Content-Type": "text/html"}, content="<html>secret words</html>")
    assert str(runpod_api._error(answer)) == "HTTP 502, an HTML error page (HTTP 502)"
