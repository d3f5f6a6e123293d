"""Copying, small screens, the keyboard."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serve import saying
from tests.serve.page.browser import ELSEWHERE, Page, visit
from tests.serve.server import Server

pytestmark = pytest.mark.system


def reads(found: Any, text: str) -> bool:
    return bool(found.text == text)


def pasted(page: Page) -> str:
    page.find("#prompt").clear()
    page.type(Keys.CONTROL, "v")
    page.type(Keys.NULL)
    return str(page.find("#prompt").get_property("value"))


@pytest.mark.parametrize("host", ["127.0.0.1", ELSEWHERE])
def test_code_and_answers_are_copied(host: str, driver: Any, server_saying: Server) -> None:
    """Also over plain http, where browsers have no navigator.clipboard."""
    page = visit(driver, server_saying.url.replace("127.0.0.1", host), "llama")
    assert driver.execute_script("return [isSecureContext, !!navigator.clipboard]") == [host != ELSEWHERE] * 2
    page.ask("code, f")
    page.answered()
    for index, (_, code) in list(enumerate(saying.FENCED))[:3]:
        pressed = driver.find_elements(By.CSS_SELECTOR, ".code button")[index]
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", pressed)
        pressed.click()
        page.until(functools.partial(reads, pressed, "Copied"))
        assert pasted(page) == code
    page.until(lambda: page.find(".assistant .below button").text == "Copy")
    page.find(".assistant .below button").click()
    page.until(lambda: page.find(".assistant .below button").text == "Copied")
    assert pasted(page) == saying.FENCES
    driver.execute_script(
        "document.execCommand = () => false; Object.defineProperty(navigator, 'clipboard', {value: null})"
    )
    pressed = page.find(".code button")
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", pressed)
    page.until(lambda: pressed.text == "Copy")
    pressed.click()
    page.until(lambda: pressed.text == "Press Ctrl+C")
    assert driver.execute_script("return getSelection().toString()") == saying.FENCED[0][1]


def test_it_fits_a_small_screen_and_the_keyboard_reaches_everything(sayer: Page) -> None:
    sayer.resize(360)
    try:
        for question in ("some m", "code, f", "nasty x"):
            sayer.ask(question)
            sayer.answered()
        sayer.find("#settings-button").send_keys(Keys.ENTER)
        assert sayer.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [360, 360]
        assert sayer.driver.execute_script("return log.scrollWidth - log.clientWidth") == 0
        sayer.find("#settings-button").send_keys(Keys.ENTER)
        reached = []
        for _ in range(60):
            webdriver.ActionChains(sayer.driver).send_keys(Keys.TAB).perform()
            reached.append(sayer.driver.execute_script("const a = document.activeElement; return a.id || a.innerText"))
        assert {"chats-button", "new", "settings-button", "prompt", "Copy", "Try again", "Edit"} <= set(reached)
        assert 'print("```")' in {str(text).strip() for text in reached}
    finally:
        sayer.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
