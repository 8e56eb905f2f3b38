"""The gateway's page for people: everything that the description says, and nothing from another host."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import httpx
import pytest

from daemon.gateway.openapi import render_page


class _Page(HTMLParser):
    """What a browser would fetch, and whether every element that was opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attributes if name in {"href", "src", "action", "data"}]
        self.ids |= {str(value) for name, value in attributes if name == "id"}
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def docs(shared_client: httpx.Client) -> httpx.Response:
    answer = shared_client.get("/docs", headers={"Authorization": ""})
    assert answer.status_code == 200
    return answer


def test_the_page_needs_no_other_host_and_no_script(docs: httpx.Response) -> None:
    page = _Page(docs.text)
    assert not page.open
    assert "script" not in page.tags and "link" not in page.tags
    assert [address for address in page.addresses if not re.match(r"(#\w+|openapi\.json)$", address)] == []
    assert re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+|url\(|@import", docs.text) == []
    assert docs.headers["content-security-policy"].startswith("default-src 'none'")


def test_the_page_shows_every_operation_field_and_answer(docs: httpx.Response, shared_client: httpx.Client) -> None:
    description = shared_client.get("/openapi.json").json()
    for path, methods in description["paths"].items():
        for method in methods:
            assert f"<b>{method.upper()}</b> <code>{path}</code>" in docs.text
    shapes = description["components"]["schemas"]
    assert {address[1:] for address in _Page(docs.text).addresses if address.startswith("#")} <= set(shapes)
    assert set(shapes) <= _Page(docs.text).ids
    for shape in shapes.values():
        for field in shape.get("properties", {}):
            assert f"<code>{field}</code>" in docs.text


def test_words_of_the_description_cannot_become_markup() -> None:
    evil = "<script src=//evil.test>'\"</script>"
    html = render_page(
        {
            "info": {"title": evil, "description": evil},
            "paths": {
                f"/{evil}": {"get": {"tags": [evil], "description": evil, "responses": {"200": {"description": evil}}}}
            },
            "components": {"schemas": {"Shape": {"properties": {evil: {"type": "string", "description": evil}}}}},
        }
    )
    page = _Page(html)
    assert "script" not in page.tags and page.addresses == ["openapi.json"]
