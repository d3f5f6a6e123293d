"""User actions on the chat page in a real browser: Debian's Chromium, headless."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=900,760"
)
# An RFC 5737 address mapped to this machine: browsers treat plain http as secure on local addresses only.
ELSEWHERE = "192.0.2.1"


class Page:
    """User actions on the page, and the visible text."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)"
        return list(self.driver.execute_script(script, selector))

    def labels(self, selector: str) -> list[str]:
        """Accessible names."""
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.ariaLabel)"
        return list(self.driver.execute_script(script, selector))

    def shows(self, selector: str, *texts: str) -> None:
        self.until(lambda: self.texts(selector) == [*texts])

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        return WebDriverWait(self.driver, seconds, 0.02).until(lambda _: condition())

    def type(self, *keys: str) -> None:
        self.find("#prompt").send_keys(*keys)

    def ask(self, text: str) -> None:
        before = len(self.texts(".assistant"))
        self.driver.execute_script("document.getElementById('prompt').value = arguments[0]", text[:-1])
        self.type(text[-1], Keys.ENTER)
        self.until(lambda: len(self.texts(".assistant")) > before)

    def answered(self) -> str:
        """The last answer, after it is complete."""
        self.until(lambda: self.find("#send").is_displayed() and self.texts(".below"))
        return self.texts(".assistant .text")[-1]

    def press(self, text: str, within: str = "") -> None:
        """Presses the last visible button with this label or accessible name."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].findLast((one) => one.checkVisibility()"
            " && (one.getAttribute('aria-label') ?? one.textContent) === arguments[1])"
        )
        found = self.driver.execute_script(script, f"{within} button", text)
        assert found, f"no button {text!r} {within}"
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
        found.click()

    def hotkey(self, key: str) -> None:
        webdriver.ActionChains(self.driver).key_down(Keys.ALT).send_keys(key).key_up(Keys.ALT).perform()

    def reload(self) -> None:
        """Reloads the page and waits until it listens."""
        self.driver.refresh()
        self.until(lambda: self.find("#name").text not in ("", "axrun"))

    def resize(self, width: int, height: int = 640) -> None:
        """Emulates a screen until `Emulation.clearDeviceMetricsOverride`."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def call(self, script: str, *given: Any) -> Any:
        """Runs an async function body in the page; `Writing` and `clean` are those of markdown.js."""
        return self.module("markdown.js", f"const {{load, Writing, clean}} = it; await load(); {script}", *given)

    def module(self, name: str, script: str, *given: Any) -> Any:
        """Runs an async function body in the page; `it` is the module, `given` are the arguments."""
        whole = (
            "const [done, ...given] = [arguments[arguments.length - 1], ...arguments];"
            f"import('/{name}').then(async (it) => {{ {script} }})"
            ".then((found) => done(found ?? null), (error) => done(`${error.name}: ${error.message}`))"
        )
        return self.driver.execute_async_script(whole, *given)

    def set(self, name: str, value: str) -> None:
        if not self.find("#settings").is_displayed():
            self.find("#settings-button").click()
        field = self.find(f"#{name}")
        self.driver.execute_script("arguments[0].closest('details')?.setAttribute('open', '')", field)
        if field.tag_name == "select":
            return Select(field).select_by_visible_text(value)
        field.clear()
        field.send_keys(value)
        return None


def start(profile: Path) -> Any:
    """A running browser."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "the page is tested in Chromium: apt-get install chromium chromium-driver"
    assert chromedriver, "the page is tested in Chromium: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.add_argument(f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(chromedriver))


def visit(driver: Any, url: str, name: str) -> Page:
    """Opens the page with empty storage."""
    driver.get(url)
    driver.execute_script("localStorage.clear(); sessionStorage.clear()")
    driver.get(url)
    page = Page(driver)
    page.until(lambda: page.find("#name").text == name)
    driver.get_log("browser")
    return page


def tokens_read(figures: str) -> int:
    """The number of tokens that an answer's figures say were read."""
    found = re.search(r"(\d+) tokens read", figures)
    assert found, figures
    return int(found[1])
