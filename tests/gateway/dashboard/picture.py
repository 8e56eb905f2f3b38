"""Make the README's picture of the dashboard, or pictures in all sizes: the real gateway over a seeded database.

python -m tests.gateway.dashboard.picture              # docs/images/dashboard.png
python -m tests.gateway.dashboard.picture FOLDER       # three sizes, both themes, overview and two jobs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from uuid import UUID

from tests.gateway.conftest import KEY, Gateway
from tests.gateway.dashboard.browser import Browser, open_browser
from tests.gateway.dashboard.comparison_rows import record
from tests.gateway.dashboard.seeded_world import seed
from tests.lifecycle.queue import Queue
from tests.paths import ROOT
from tests.postgres import migrated, open_server

SIZES = {"wide": (1440, 900), "tablet": (820, 1180), "phone": (390, 844)}
PICTURE = ROOT / "docs" / "images" / "dashboard.png"


def take(browser: Browser, url: str, file: Path, size: str, theme: str, view: str = "", full: bool = False) -> None:
    browser.resize(*SIZES[size], theme=theme)
    browser.driver.get(f"{url}/dashboard#/{view}")
    browser.driver.refresh()
    browser.wait_for("canvas" if view else ".running .spark .line[d^=M]")
    if full:
        # All of the page, not only what a screen shows of it.
        browser.resize(SIZES[size][0], int(browser.number("return document.documentElement.scrollHeight")), theme=theme)
    file.write_bytes(browser.driver.get_screenshot_as_png())


def picture_comparison(browser: Browser, url: str, folder: Path, name: str, comparison: UUID) -> None:
    """One comparison, a ballot and its result, in the size and theme of the moment."""
    for view, shown in ((str(comparison), ".answers"), (f"{comparison}/vote", "#voter")):
        browser.driver.get(f"{url}/dashboard#/comparisons/{view}")
        element = browser.wait_for(shown)
        (folder / f"comparison-{name}.png").write_bytes(browser.driver.get_screenshot_as_png())
        name = f"ballot-{name}"
    element.clear()
    element.send_keys(name)
    browser.find("form button").click()
    browser.wait_for(".choices")
    (folder / f"{name}.png").write_bytes(browser.driver.get_screenshot_as_png())


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as scratch, open_server() as server, server.database() as name:
        Path(scratch).chmod(0o755)
        migrated(server, name)
        dsn = server.dsn(name)
        jobs = seed(dsn)
        queue = Queue(dsn, Path(scratch))
        comparison = record(dsn, queue.user_id, ("3f2a91bc", "c01dfeed"), 4)
        with Gateway(queue, Path(scratch)) as gateway, open_browser() as browser:
            browser.resize(*SIZES["wide"])
            browser.sign_in(gateway.url, KEY)
            browser.wait_for(".running .row")
            if folder is None:
                PICTURE.parent.mkdir(exist_ok=True)
                take(browser, gateway.url, PICTURE, "wide", "light")
                return
            folder.mkdir(exist_ok=True)
            for size in SIZES:
                for theme in ("light", "dark"):
                    take(browser, gateway.url, folder / f"overview-{size}-{theme}.png", size, theme)
                    if size != "wide" or theme == "light":
                        take(browser, gateway.url, folder / f"whole-{size}-{theme}.png", size, theme, full=True)
                    for job in ("running1", "failed", "completed"):
                        take(
                            browser, gateway.url, folder / f"{job}-{size}-{theme}.png", size, theme, f"jobs/{jobs[job]}"
                        )
                    picture_comparison(browser, gateway.url, folder, f"{size}-{theme}", comparison)
            print("\n".join(browser.complaints()) or "the console has no complaint")


if __name__ == "__main__":
    main()
