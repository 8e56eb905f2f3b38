"""The HTML file of a comparison: every word of a model is text in it, and a word that is none runs nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from daemon.comparison.page import page_of, write_page
from tests.gateway.dashboard.comparison_rows import comparison

HOSTILE = '</p><script>window.pwned=1</script><img src=x onerror="pwned()">{{7*7}}\u202e\x1b[2J & '


class Read(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_every_word_is_text_and_nothing_is_loaded() -> None:
    shown = comparison((f"{HOSTILE}quick", "slow"), 2, words=HOSTILE)
    shown.judged = [{"judge": HOSTILE, "pair": ["base", HOSTILE], "votes": {}, "words": HOSTILE}]
    read = Read()
    text = page_of(shown)
    read.feed(text)
    assert not read.tags & {"script", "img", "link", "iframe"} and not {"src", "href", "onerror"} & read.attributes
    everything = " ".join(read.texts)
    assert "<script>window.pwned=1</script>" in everything and "Question 2: what should I do" in everything
    assert "\u202e" not in text and "\x1b" not in text
    assert "default-src 'none'" in text
    assert {"1.9000", "1.6500", "1.4000"} <= set(re.findall(r"\d\.\d{4}", everything))


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text("before")
    write_page(comparison(("quick",), 1, words="\ud800"), file)
    assert file.read_text().startswith("<!doctype html>") and [entry.name for entry in tmp_path.iterdir()] == [
        "page.html"
    ]
