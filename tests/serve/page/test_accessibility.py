"""axe-core on every state of the page; keyboard shortcuts; what a screen reader is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from requirements.page import TEST_LIB
from tests.serve.page.browser import Page
from tests.serve.page.test_thoughts_and_calls import WEATHER

pytestmark = pytest.mark.system
AXE = TEST_LIB / "axe.js"


@pytest.fixture
def screen(sayer: Page) -> Iterator[Page]:
    yield sayer
    sayer.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def violations(page: Page) -> list[Any]:
    """What axe-core finds, without the minor and moderate."""
    assert AXE.is_file(), "axe-core is missing: make test-all brings it, with npm"
    if not page.driver.execute_script("return Boolean(window.axe)"):
        page.driver.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text()})  # the policy forbids a script
    found = page.driver.execute_async_script("axe.run(document).then(arguments[0], arguments[0])")["violations"]
    return [
        (one["id"], one["impact"], [node["target"] for node in one["nodes"]][:3])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(width: int, theme: str, screen: Page) -> None:
    screen.set("theme", theme)
    screen.set("tools", json.dumps([WEATHER]))
    screen.find("#settings-button").click()
    screen.resize(width)
    assert violations(screen) == []  # empty
    fault = "const text = document.getElementById('empty'); text.style.color = arguments[0]"
    screen.driver.execute_script(fault, "gray" if theme == "light" else "#555")
    assert [name for name, *_ in violations(screen)] == ["color-contrast"]
    screen.driver.execute_script(fault, "")
    for question in ("one t", "some m", "code, f", "weather c"):
        screen.ask(question)
        screen.answered()
    screen.press("Try again", ".turn:nth-of-type(2)")
    screen.answered()
    screen.hotkey(",")
    screen.driver.execute_script("for (const one of document.querySelectorAll('.turn details')) one.open = true")
    assert violations(screen) == []  # thoughts, Markdown, code, calls, versions, results
    screen.driver.execute_script("for (const one of document.querySelectorAll('.turn')) one.classList.add('left-out')")
    screen.press("Edit", ".user")
    screen.hotkey("s")
    screen.driver.execute_script("for (const one of document.querySelectorAll('#settings details')) one.open = true")
    assert violations(screen) == []  # an editor, the settings
    screen.hotkey("s")
    if not screen.find("#chats").is_displayed():
        screen.hotkey("c")
    screen.press("Rename one t") if width == 360 else None
    assert violations(screen) == []  # the conversations
    screen.hotkey("h")
    assert violations(screen) == []  # the shortcuts
    assert screen.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
    screen.find("#keys-close").click()


def test_shortcuts_do_what_the_list_says(sayer: Page) -> None:
    def focused() -> str:
        return str(sayer.driver.execute_script("return document.activeElement.id"))

    sayer.hotkey("h")
    listed = [text.replace("\n", " ") for text in sayer.texts("#key-list dt")]
    assert listed[:9] == [f"Alt {key}" for key in "NCSIER,.H"]
    sayer.hotkey("s")
    assert not sayer.find("#settings").is_displayed()  # the dialog is modal
    sayer.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not sayer.find("#keys").is_displayed()
    sayer.hotkey("s")
    assert focused() == "system"
    assert sayer.find("#settings-button").get_attribute("aria-expanded") == "true"
    sayer.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert focused() == "settings-button"
    sayer.hotkey("c")
    assert focused() == "search"
    sayer.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert focused() == "chats-button"
    sayer.hotkey("i")
    assert focused() == "prompt"
    sayer.hotkey("r")  # there is nothing to try again, to edit or to switch
    sayer.hotkey("e")
    sayer.hotkey(",")
    sayer.ask("one s")
    sayer.answered()
    sayer.hotkey("r")
    sayer.until(lambda: sayer.labels(".versions") == ["Version 2 of 2"])
    sayer.answered()
    sayer.hotkey("e")
    assert sayer.driver.switch_to.active_element.get_property("value") == "one s"
    sayer.hotkey("n")
    assert sayer.texts(".turn") == []
    assert focused() == "prompt"


def test_a_screen_reader_hears_an_answer_once_it_is_complete(sayer: Page) -> None:
    """A log is read as it grows, except while it is busy."""
    assert sayer.find("#log").aria_role == "log"
    sayer.ask("for ever: e")
    sayer.until(lambda: sayer.texts(".writing .text")[-1:] > [""])
    assert sayer.find(".writing").get_attribute("aria-busy") == "true"
    sayer.find("#stop").click()
    sayer.answered()
    assert sayer.driver.execute_script("return document.querySelectorAll('[aria-busy]').length") == 0
    assert [found.accessible_name for found in sayer.driver.find_elements("css selector", ".turn")] == ["You", "Answer"]
