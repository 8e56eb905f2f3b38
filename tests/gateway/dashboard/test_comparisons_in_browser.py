"""Comparisons in real Chromium: side by side, and blind votes by key, in both themes and on a phone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemon_process import eventually
from tests.gateway.conftest import KEY, Gateway
from tests.gateway.dashboard.browser import Browser, open_browser
from tests.gateway.dashboard.comparison_rows import record
from tests.lifecycle.queue import Queue

pytestmark = pytest.mark.system

HOSTILE = '"><img src=x onerror="window.pwned=1"><script>window.pwned=1</script>{{7*7}}\u202e '
NUMBER = "return document.querySelector('figure')?.dataset.number ?? 'end'"
# The darkest problem of two themes: text that is there and cannot be read.
CONTRAST = """
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
    const c = part / 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$|transparent/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
return Math.min(...[...document.querySelectorAll("main *")]
  .filter((e) => e.offsetParent && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  }));
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Browser, gateway: Gateway) -> Browser:
    chromium.driver.get("about:blank")
    chromium.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    chromium.complaints()
    chromium.resize(1440, 900)
    chromium.sign_in(gateway.url, KEY)
    chromium.wait_for("#to-comparisons")
    return chromium


def begin(page: Browser, voter: str) -> None:
    box = page.wait_for("#voter")
    box.clear()
    box.send_keys(voter)
    page.find("form button").click()
    page.wait_for(".choices")


def press(page: Browser, key: str) -> None:
    before = page.driver.execute_script(NUMBER)
    page.find("body").send_keys(key)
    eventually(lambda: page.driver.execute_script(NUMBER) != before, why=page.text)


def test_a_person_votes_blind_by_key_and_learns_the_names_at_the_end(page: Browser, queue: Queue) -> None:
    kept = record(queue.dsn, queue.user_id, ("quick",), 4)
    page.find("#to-comparisons").click()
    page.wait_for(f"[data-comparison='{kept}'] .name").click()
    page.wait_for_text("quick answers question 1.")
    assert "1.6500" in page.text() and "Read a book, and then another." in page.text()
    page.find("#vote").click()
    begin(page, "Anna")
    # Nothing of who is who, but what the answers themselves say.
    assert "quick" not in page.find("main").text.replace("quick answers", "")
    chosen = []
    for key in "120":
        left, right = (element.text.split()[0] for element in page.all(".answers p"))
        chosen.append({"1": left, "2": right, "0": "tie"}[key])
        press(page, key)
    page.driver.refresh()  # what was voted stays voted
    begin(page, "Anna")
    assert page.find("#count").text == "4 of 4"
    left, right = (element.text.split()[0] for element in page.all(".answers p"))
    page.find("[data-side=right]").click()
    page.wait_for("#result")
    chosen.append(right)
    rows = queue.select("SELECT choice FROM training_votes WHERE comparison_id = %s ORDER BY number", kept)
    assert [row["choice"] for row in rows] == [{"base": "one", "quick": "two", "tie": "tie"}[who] for who in chosen]
    shown = {choice: page.find(f"#result [data-choice={choice}] dd").text for choice in ("one", "two", "tie")}
    assert shown == {choice: str([row["choice"] for row in rows].count(choice)) for choice in shown}
    assert "1 person · base and quick" in page.text()
    assert all("/dashboard/session" in words for words in page.complaints()), page.complaints()


def test_a_models_words_are_text_and_nothing_else(page: Browser, queue: Queue, gateway: Gateway) -> None:
    kept = record(queue.dsn, queue.user_id, (f"{HOSTILE}quick", "other"), 2, words=HOSTILE)
    for view in ("", f"/{kept}", f"/{kept}/vote"):
        page.driver.get(f"{gateway.url}/dashboard#/comparisons{view}")
        page.wait_for(".short, .answers, #voter")
    begin(page, HOSTILE.replace("\u202e", "").strip()[:60])
    press(page, "1")
    press(page, "2")
    page.wait_for("#result")
    assert page.driver.execute_script("return window.pwned") is None
    assert not page.all("main img, main script") and "\u202e" not in page.text()
    assert "{{7*7}}" in page.text()
    assert all("/dashboard/session" in words for words in page.complaints()), page.complaints()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_every_word_can_be_read_and_nothing_overflows(
    page: Browser, queue: Queue, gateway: Gateway, theme: str, width: int, height: int
) -> None:
    kept = record(queue.dsn, queue.user_id, ("3f2a91bc", "c01dfeed", "0badcafe"), 2)
    page.resize(width, height, theme=theme)

    def look() -> None:
        assert page.number(CONTRAST) >= 4.5, page.text()[:300]
        overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.number(overflow) <= 0
        assert page.driver.get_screenshot_as_png()[:4] == b"\x89PNG"

    for view, shown in (("", ".short"), (f"/{kept}", ".answers"), (f"/{kept}/vote", "#voter")):
        page.driver.get(f"{gateway.url}/dashboard#/comparisons{view}")
        page.wait_for(shown)
        look()
    begin(page, "Anna")
    look()
    press(page, "1")
    press(page, "0")
    page.wait_for("#result")
    look()
