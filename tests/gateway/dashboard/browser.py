"""Debian's Chromium, driven by its own driver: a new empty profile each time, nothing of it left afterwards."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.daemon_process import eventually

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--force-color-profile=srgb", "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """One Chromium, with what the tests do to it in words."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def resize(self, width: int, height: int, *, scale: float = 1.0, theme: str = "light") -> None:
        """The viewport itself, whatever the window around it would need, and the system's theme."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600},
        )
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )

    def sign_in(self, url: str, key: str) -> None:
        self.driver.get(f"{url}/dashboard")
        self.wait_for("#key").send_keys(key)
        self.find("form.login button").click()

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait_for(self, selector: str, *, seconds: float = 30.0) -> WebElement:
        """The first visible element of this kind."""

        def visible() -> WebElement | None:
            try:
                return next((found for found in self.all(selector) if found.is_displayed()), None)
            except StaleElementReferenceException:
                return None  # the page drew itself anew between the two questions

        return eventually(
            visible, seconds=seconds, why=lambda: f"no {selector} in: {self.text()[:2000]}\n{self.complaints()}"
        )

    def wait_for_text(self, words: str, *, seconds: float = 30.0) -> None:
        eventually(lambda: words in self.text(), seconds=seconds, why=lambda: f"no {words!r} in: {self.text()[:3000]}")

    def text(self) -> str:
        """What stands in the page, without what is hidden."""
        return str(self.driver.execute_script("return document.body.innerText"))

    def number(self, script: str) -> float:
        return float(self.driver.execute_script(script))

    def complaints(self) -> list[str]:
        """Errors of the console: scripts that failed, and what the page's policy refused."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@contextmanager
def open_browser() -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "needs Debian's chromium and chromium-driver: .ci/system-packages installs them"
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        chrome = Chrome(options=options, service=Service(driver, log_output=str(Path(profile) / "driver.log")))
        try:
            yield Browser(chrome)
        finally:
            chrome.quit()
