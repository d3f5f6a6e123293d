"""The page at / in a real browser: Debian's Chromium, headless, against a real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.serve.server import Server, Start

pytestmark = pytest.mark.system

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=900,760"
)


class Page:
    """What a person does with the page and sees on it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((found) => found.innerText)"
        return list(self.driver.execute_script(script, selector))

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
        """The last answer, once it is complete."""
        self.until(lambda: self.find("#send").is_displayed() and self.texts(".below"))
        return self.texts(".assistant .text")[-1]

    def set(self, name: str, value: str) -> None:
        if not self.find("#settings").is_displayed():
            self.find("#settings-button").click()
        field = self.find(f"#{name}")
        field.clear()
        field.send_keys(value)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium, "the page is tested in Chromium: apt-get install chromium chromium-driver"
    assert chromedriver, "the page is tested in Chromium: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Any, server_long: Server) -> Page:
    """The page as a new visitor sees it."""
    driver.get(server_long.url)
    driver.execute_script("localStorage.clear(); sessionStorage.clear()")
    driver.execute_script("messages = []")  # or the page saves what it has when it is left
    driver.get(server_long.url)
    page = Page(driver)
    page.until(lambda: page.find("#model").text == "qwen2")
    driver.get_log("browser")
    return page


def test_a_question_is_answered(page: Page, server_long: Server) -> None:
    assert page.find("#empty").is_displayed()
    assert not page.find("#send").is_enabled()
    page.ask("who are you?")
    answer = page.answered()
    assert answer == server_long.chat("who are you?")["choices"][0]["message"]["content"]
    assert page.texts(".user .text") == ["who are you?"]
    assert " tok/s" in page.texts(".figures")[0]
    assert not page.find("#empty").is_displayed()
    assert page.driver.switch_to.active_element == page.find("#prompt")
    assert page.driver.get_log("browser") == []


def test_a_second_question_sees_the_first(page: Page) -> None:
    page.ask("1+1=")
    assert page.answered() == "2"
    first = page.texts(".figures")[0]
    page.ask("2+2=")
    page.answered()
    sent = page.driver.execute_script("return JSON.parse(request().body).messages.length")
    assert (sent, len(page.texts(".turn"))) == (4, 4)
    count = [int(text.split(" tokens read")[0].split()[-1]) for text in (first, page.texts(".figures")[1])]
    assert count[1] > count[0]


def test_an_answer_is_shown_as_it_streams_and_stop_keeps_what_came(
    page: Page, server_long: Server, endless: dict[str, int]
) -> None:
    page.driver.execute_script(
        "const plain = request;"
        "request = () => {"
        "  const given = plain();"
        "  return {...given, body: JSON.stringify({...JSON.parse(given.body), logit_bias: ENDLESS})};"
        "}".replace("ENDLESS", json.dumps(endless))
    )
    cancelled = server_long.metrics()["axrun_cancelled_total"]
    for stop in (lambda: page.type(Keys.ESCAPE), lambda: page.find("#stop").click()):
        page.ask("tell me a long story")
        seen: set[str] = set()
        while len(seen) < 4:
            seen.add(page.until(lambda: page.texts(".writing .text")[-1]))
        stop()
        answer = page.answered()
        assert all(answer.startswith(part) for part in seen)
        assert "stopped" in page.texts(".figures")[-1]
    assert server_long.idle()["axrun_cancelled_total"] == cancelled + 2


def test_reload_keeps_the_conversation_and_new_chat_forgets_it(page: Page) -> None:
    page.set("system", "Be brief.")
    page.ask("12+30=")
    answer = page.answered()
    page.driver.refresh()
    page.until(lambda: page.texts(".turn .text") == ["12+30=", answer])
    assert page.find("#system").get_attribute("value") == "Be brief."
    assert page.driver.execute_script("return JSON.parse(request().body).messages[0].role") == "system"
    page.find("#new").click()
    assert page.texts(".turn") == []
    page.driver.refresh()
    assert page.texts(".turn") == []
    assert page.find("#empty").is_displayed()


def test_what_the_model_says_is_never_html(page: Page) -> None:
    said = "<img src=x onerror=alert(1)>\\n```\\n<b>code</b>\\n```\\nend"
    page.driver.execute_script(f"messages = [{{role: 'assistant', content: '{said}', figures: ''}}]; showAll()")
    assert page.driver.find_elements(By.CSS_SELECTOR, ".turn img, .turn b") == []
    assert page.texts(".turn pre") == ["<b>code</b>"]
    assert page.texts(".turn .text")[0].startswith("<img src=x onerror=alert(1)>")


def test_an_error_is_shown_and_can_be_tried_again(page: Page) -> None:
    page.ask("1+" * 4200)
    page.answered()
    assert "This model's context is 8191 tokens" in page.texts(".error")[0]
    page.find(".below button:nth-of-type(2)").click()
    assert page.find("#prompt").get_property("value") == "1+" * 4200
    assert page.texts(".turn") == []
    page.find("#prompt").clear()
    page.set("temperature", "9")
    page.ask("1+1=")
    page.answered()
    assert page.texts(".error") == ["temperature is 9; expected at most 2."]
    page.set("temperature", "0")
    page.find(".below button").click()
    page.until(lambda: page.texts(".assistant .text") == ["2"])
    assert page.texts(".error") == []


def test_a_key_is_asked_for_and_a_lost_server_is_said(driver: Any, bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, AXRUN_API_KEY="open-sesame").ready()
    driver.get(server.url)
    page = Page(driver)
    page.until(lambda: page.find("#model").text == "qwen2")
    page.ask("1+1=")
    page.answered()
    assert "API key" in page.texts(".error")[0]
    assert page.find("#settings").is_displayed()
    page.set("key", "open-sesame")
    page.find(".below button").click()
    page.until(lambda: page.texts(".assistant .text") == ["2"])
    server.stop()
    page.ask("1+2=")
    page.answered()
    assert page.texts(".error") == ["The server cannot be reached."]


def test_the_page_needs_nothing_from_elsewhere(server_long: Server) -> None:
    page = server_long.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("/", "/chat.js", "/chat.css"):
        response = server_long.client.get(name)
        assert response.status_code == 200
        assert "http://" not in response.text
        assert "https://" not in response.text
