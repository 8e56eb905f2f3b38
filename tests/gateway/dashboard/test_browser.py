"""The dashboard in real Chromium, over the real gateway, a real queue and daemons with the scripted trainer."""

from __future__ import annotations

import signal
import socket
import statistics
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from benchmarks.dashboard import measure
from daemon.database.embedded_server import EmbeddedPostgres
from daemon.schema.migrations import migrate
from tests.daemon_process import eventually
from tests.gateway.conftest import KEY, Gateway
from tests.gateway.dashboard.browser import Browser, open_browser
from tests.gateway.dashboard.seeded_world import World, open_world, seed
from tests.lifecycle.queue import Queue
from tests.postgres import Server

pytestmark = pytest.mark.system

LONG = ["steps", 400, 0.05]
POINTS = "return Number(document.querySelector('.plot')?.dataset.points ?? 0)"
CURVE = "return document.querySelector('.running .spark .line')?.getAttribute('d')?.split('L').length ?? 0"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """As new for each test: signed out, no word in the console, a screen of the usual size."""
    chromium.driver.get("about:blank")
    chromium.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
    chromium.complaints()
    chromium.resize(1440, 900)
    return chromium


@pytest.fixture
def signed_in(browser: Browser, gateway: Gateway) -> Browser:
    browser.sign_in(gateway.url, KEY)
    browser.wait_for_text("Nothing waits.")
    return browser


def test_a_job_trains_before_ones_eyes_and_its_curve_grows(signed_in: Browser, queue: Queue, tmp_path: Path) -> None:
    page = signed_in
    job = queue.insert(script=[["steps", 160, 0.04]], hyperparameters={"base_model": "tiny"})
    page.wait_for(f".waiting [data-job='{job}']")
    page.wait_for_text("no worker")
    with queue.daemon(tmp_path):
        page.wait_for(f".running [data-job='{job}'][data-state=running]")
        before = eventually(lambda: page.number(CURVE) or None, seconds=30)
        eventually(lambda: page.number(CURVE) > before + 1, seconds=30, why=page.text)
        page.wait_for(f".running [data-job='{job}'] .name").click()
        page.wait_for(".plot canvas")
        points = page.number(POINTS)
        eventually(lambda: page.number(POINTS) > points, seconds=30, why=page.text)
        page.wait_for(".state.large[data-state=completed]", seconds=60)
        page.wait_for_text("The whole adapter (tar.gz)")
        # The curve that is shown in the end is the one in the rows, whole.
        eventually(
            lambda: page.number(POINTS) == len(queue.points(job)), seconds=30, why=lambda: str(page.number(POINTS))
        )
    assert "Training has begun" in page.text() and "A host has claimed the job (attempt 1 of 3)" in page.text()
    # One refusal is the page's own question whether it is signed in.
    assert all("/dashboard/session" in words for words in page.complaints()), page.complaints()


def test_a_job_is_cancelled_by_a_click_and_a_confirmation(signed_in: Browser, queue: Queue, tmp_path: Path) -> None:
    page = signed_in
    job = queue.insert(script=[LONG])
    with queue.daemon(tmp_path):
        page.wait_for(f".running [data-job='{job}'][data-state=running] .name").click()
        page.wait_for("#cancel").click()
        page.wait_for_text("Cancel this job?")
        page.find("#ask-no").click()
        eventually(lambda: not page.find("#ask").is_displayed())
        assert queue.row(job)["status"] == "running"
        page.find("#cancel").click()
        page.wait_for("#ask-yes").click()
        page.wait_for(".state.large[data-state=cancelled]")
        assert queue.wait_for(job, "cancelled")
        page.wait_for("#retry").click()
        page.wait_for("#ask-yes").click()
        page.wait_for(".state.large[data-state=running], .state.large[data-state=initializing]")
    assert "resubmitted" in queue.story(job)


def test_a_failed_job_says_what_happened_and_what_to_do(signed_in: Browser, queue: Queue, tmp_path: Path) -> None:
    page = signed_in
    fault = {
        "code": "out_of_memory", "message": "The GPU ran out of memory at one conversation a micro-batch.",
        "hint": "reduce lora_rank (current 64), then try the job again", "transient": False,
    }  # fmt: skip
    job = queue.insert(script=[["steps", 5, 0.01], ["say", "failed", fault], ["exit", 1]])
    with queue.daemon(tmp_path):
        row = queue.wait_for(job, "failed")
    page.wait_for(f".ended [data-job='{job}'] .name").click()
    box = page.wait_for(".fault-box")
    happened = row["error_message"].removesuffix(row["error_hint"]).strip()
    for words in (row["error_code"], happened, f"What to do: {row['error_hint']}"):
        assert words and box.text.count(words) == 1, (words, box.text)
    assert box.text.count(row["error_hint"]) == 1 and page.find("#retry").is_displayed()


def test_a_wrong_key_is_refused_in_words_and_signing_out_shows_nothing(
    browser: Browser, gateway: Gateway, queue: Queue
) -> None:
    job = queue.insert()
    browser.sign_in(gateway.url, "not-the-key-of-this-test")
    browser.wait_for_text("This key is not one of the gateway's.")
    browser.find("#key").clear()
    browser.find("#key").send_keys(KEY)
    browser.find("form.login button").click()
    browser.wait_for(f".waiting [data-job='{job}']")
    assert not browser.driver.execute_script("return document.cookie")
    browser.driver.refresh()
    browser.wait_for(f".waiting [data-job='{job}']")
    browser.find("#sign-out").click()
    browser.wait_for("#key")
    assert not browser.all("[data-job]")
    browser.driver.refresh()
    browser.wait_for("#key")


HOSTILE = (
    '"><img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'
    "<svg onload=window.pwned=1>{{7*7}}${window.pwned=1}javascript:window.pwned=1//\u202e\u0007</textarea></title>"
)


def hostile_world(world: World) -> tuple[str, str]:
    """Two jobs, one under way and one failed, with poison in every field that holds text."""
    host = world.add_host(HOSTILE, 1, HOSTILE, 80.0, 1, pod=HOSTILE)
    running = world.train(host, 0.4, HOSTILE, HOSTILE, 40, 100.0)
    failed = world.finish("failed", 0.1, 3.0, (HOSTILE, HOSTILE, HOSTILE))
    spec = {"base_model": HOSTILE, HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}, "__proto__": HOSTILE}
    for job in (running, failed):
        world.update_job(
            job, current_stage=HOSTILE[:50], preset_id=HOSTILE[:50], error_stack=HOSTILE, hyperparameters=spec,
            gpu_config=spec, client_job_id=f"{job}{HOSTILE}", dataset_url=f"https://example.test/{HOSTILE}",
            adapter_path=HOSTILE, adapter_sha256=HOSTILE, error_code=HOSTILE, error_message=HOSTILE, error_hint=HOSTILE,
            result={"artifacts": {"archive": HOSTILE, HOSTILE: HOSTILE, "javascript_alert": HOSTILE}},
            current_metrics={"training_loss": HOSTILE, "throughput": [HOSTILE], HOSTILE: 1},
        )  # fmt: skip
        world.tell(job, 1, HOSTILE, HOSTILE, attempt=HOSTILE, cost=HOSTILE)
        world.tell(job, 1, "claimed", HOSTILE, attempt=HOSTILE)
        world.tell(job, 1, "evaluated", HOSTILE, step=HOSTILE, validation_loss=HOSTILE)
        for when in ("before", "after", HOSTILE):
            world.tell(job, 1, "sample", HOSTILE, when=when, prompt=HOSTILE, answer=HOSTILE)
    world.add_job("queued", 3, base_model=HOSTILE, dataset=HOSTILE, due=True, need_gpus=9)
    return str(running), str(failed)


def test_hostile_text_in_every_field_stays_text(browser: Browser, gateway: Gateway, queue: Queue) -> None:
    with open_world(queue.dsn) as world:
        running, failed = hostile_world(world)
    browser.sign_in(gateway.url, KEY)
    browser.wait_for(f".running [data-job='{running}']")

    def harmless() -> None:
        made = browser.driver.execute_script(
            "return [window.pwned ?? null, document.querySelectorAll('img, iframe, object, embed, main script, "
            'main svg[onload], [onerror], [onload], a[href^="javascript"]\').length, typeof Object.prototype.polluted]'
        )
        assert made == [None, 0, "undefined"]
        assert "onerror" in browser.text()
        # An override of direction would turn what stands behind it: the job's own id, say.
        told = browser.text() + browser.driver.title
        assert not {"\u202e", "\u0007"} & set(told)

    harmless()
    for job in (running, failed):
        browser.driver.get(f"{gateway.url}/dashboard#/jobs/{job}")
        browser.wait_for_text(job)
        browser.wait_for(".samples figure")
        harmless()
    # Addresses of the page itself are a caller's text too.
    overview, no_such_job = f".running [data-job='{running}']", "main > .empty"
    for place, shown in (
        ("#/jobs/<img src=x onerror=window.pwned=1>", overview),
        ("#/jobs/00000000-0000-4000-8000-000000000000", no_such_job),
        ("#<svg>", overview),
    ):
        browser.driver.get(f"{gateway.url}/dashboard{place}")
        browser.wait_for(shown)
        assert browser.driver.execute_script("return window.pwned ?? null") is None
    refused = [words for words in browser.complaints() if "Content Security Policy" in words or "Uncaught" in words]
    assert not refused, refused


def test_the_browser_itself_refuses_markup_made_of_text(signed_in: Browser) -> None:
    """The second fence: a future line of ours that assigned markup would fail, not run it."""
    outcome = signed_in.driver.execute_script(
        "try { document.querySelector('main').innerHTML = '<b>x</b>'; return 'assigned'; }"
        "catch (error) { return error.name; }"
    )
    assert outcome == "TypeError"


def test_the_stream_recovers_when_the_gateway_is_started_again(browser: Browser, queue: Queue, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with Gateway(queue, tmp_path, gateway_port=port) as gateway:
        browser.sign_in(gateway.url, KEY)
        browser.wait_for_text("Live")
        gateway.signal(signal.SIGTERM)
        assert gateway.wait(30) == 0
        browser.wait_for_text("Reconnecting")
        job = queue.insert()
        gateway.start()
        # The same page, still signed in: the cookie is made of the key, not of the process.
        browser.wait_for(f".waiting [data-job='{job}']", seconds=60)
        browser.wait_for_text("Live")


def test_the_page_says_that_the_database_is_away_and_goes_on_when_it_is_back(browser: Browser, tmp_path: Path) -> None:
    with EmbeddedPostgres() as server:
        migrate(server.dsn("postgres"), local=True)
        queue = Queue(server.dsn("postgres"), tmp_path)
        first = queue.insert()
        with Gateway(queue, tmp_path) as gateway:
            browser.sign_in(gateway.url, KEY)
            browser.wait_for(f".waiting [data-job='{first}']")
            server.stop()
            browser.wait_for_text("The database has not answered since", seconds=60)
            assert browser.find(f".waiting [data-job='{first}']").is_displayed()
            server.start()
            eventually(lambda: _answers(server.dsn("postgres")), seconds=60)
            second = queue.insert()
            browser.wait_for(f".waiting [data-job='{second}']", seconds=60)
            eventually(lambda: not browser.find("#away").is_displayed(), seconds=30)


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=3).close()
    except psycopg.OperationalError:
        return False
    return True


def test_everything_can_be_done_by_keyboard(signed_in: Browser, queue: Queue) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = signed_in
    job = queue.insert()
    page.wait_for(f".waiting [data-job='{job}']")

    def press(key: str) -> None:
        ActionChains(page.driver).send_keys(key).perform()

    def tab_to(selector: str) -> None:
        for _ in range(30):
            press(Keys.TAB)
            if page.driver.execute_script("return document.activeElement?.matches(arguments[0])", selector):
                return
        raise AssertionError(f"TAB never reached {selector}")

    page.driver.execute_script("document.activeElement.blur()")
    tab_to(f"[data-job='{job}'] .name")
    press(Keys.ENTER)
    page.wait_for(".job h1")
    tab_to("#cancel")
    press(Keys.ENTER)
    page.wait_for("#ask-yes")
    press(Keys.ESCAPE)
    eventually(lambda: not page.find("#ask").is_displayed())
    assert queue.row(job)["status"] == "queued"
    assert page.driver.execute_script("return document.activeElement.id") == "cancel"
    press(Keys.ENTER)
    tab_to("#ask-yes")
    press(Keys.ENTER)
    page.wait_for(".state.large[data-state=cancelled]")


# Text against what lies behind it, by WCAG's formula, for every text that can be seen.
CONTRAST = """
const channel = (c) => ((c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgba = (colour) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
};
const over = (top, base) => top.slice(0, 3).map((c, i) => c * top[3] + base[i] * (1 - top[3]));
const behind = (element) => {
  const layers = [];
  for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((base, layer) => over(layer, base), [255, 255, 255]);
};
const poor = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !element.checkVisibility()) continue;
  if (element.closest("noscript, :disabled")) continue;
  const ground = behind(element);
  const [a, b] = [luminance(over(rgba(getComputedStyle(element).color), ground)), luminance(ground)];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) poor.push([ratio.toFixed(2), element.className, walker.currentNode.textContent.slice(0, 40)]);
}
return poor;
"""
NAMELESS = """
return [...document.querySelectorAll("button, a, input, progress, [role=img], dialog")]
  .filter((element) => element.checkVisibility())
  .filter((element) => !(element.getAttribute("aria-label") || element.getAttribute("aria-labelledby")
    || element.textContent.trim() || element.labels?.length))
  .map((element) => element.outerHTML.slice(0, 200));
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_can_be_read_and_every_control_has_a_name(
    browser: Browser, gateway: Gateway, queue: Queue, theme: str
) -> None:
    named = seed(queue.dsn)
    browser.resize(1440, 900, theme=theme)
    browser.sign_in(gateway.url, KEY)
    browser.wait_for(".running .row")
    for view in ("", f"jobs/{named['running0']}", f"jobs/{named['failed']}", f"jobs/{named['completed']}"):
        browser.driver.get(f"{gateway.url}/dashboard#/{view}")
        browser.wait_for(".story li" if view else ".ended li")
        assert browser.driver.execute_script(CONTRAST) == [], view
        assert browser.driver.execute_script(NAMELESS) == [], view


@pytest.mark.parametrize("size", [(1440, 900), (820, 1180), (390, 844), (320, 640)])
def test_nothing_is_wider_than_the_screen(
    browser: Browser, gateway: Gateway, queue: Queue, size: tuple[int, int]
) -> None:
    named = seed(queue.dsn)
    browser.resize(*size)
    browser.sign_in(gateway.url, KEY)
    browser.wait_for(".running .row")
    for view in ("", f"jobs/{named['running0']}", f"jobs/{named['failed']}", f"jobs/{named['completed']}"):
        browser.driver.get(f"{gateway.url}/dashboard#/{view}")
        browser.wait_for(".story li" if view else ".ended li")
        wide = browser.driver.execute_script(
            "return document.documentElement.scrollWidth > innerWidth ? [...document.querySelectorAll('main *')]"
            ".filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.className || e.tagName) : []"
        )
        assert wide == [], view


def test_twenty_browsers_see_a_commit_within_a_second_and_cost_what_one_costs(postgres: Server) -> None:
    """Two hundred jobs listed, ten of them written once a second, others queued; the benchmark has the slowest."""
    turn = measure(postgres, waiting=90, browsers=20, seconds=8)
    assert turn.connections == 2 and turn.lost == 0
    # Four looks a second at most, the hosts, the queue, the gateway's own chores.
    assert turn.transactions_a_second < 12
    assert statistics.median(turn.progress) < 1 and statistics.median(turn.inserts) < 1
    assert statistics.median(turn.streams) < 1
