"""Retries, reloads, several tabs, and the storage of the browser."""

from __future__ import annotations

import pytest

from tests.serve import saying
from tests.serve.page.browser import Page
from tests.serve.server import Server

pytestmark = pytest.mark.system


def test_try_again_uses_another_seed(sayer: Page) -> None:
    sayer.set("temperature", "1")
    sayer.ask("draw?")
    sayer.answered()
    for seed in ("", "7"):
        if seed:
            sayer.set("seed", seed)
        seen = set()
        for _ in range(6):
            sayer.press("Try again")
            seen.add(sayer.answered())
        assert len(seen) > 1  # six equal answers out of 260 are practically impossible
    sayer.set("temperature", "0")
    for _ in range(2):
        sayer.press("Try again")
        sayer.answered()
    assert sayer.texts(".figures")[0].endswith("same answer as before: set a temperature above 0 for other answers")


def test_a_reload_during_an_answer_keeps_the_text(sayer: Page) -> None:
    sayer.ask("one s")
    sayer.answered()
    sayer.ask("for ever: e")
    written = sayer.until(lambda: sayer.texts(".writing .text")[-1])
    sayer.reload()
    sayer.until(lambda: len(sayer.texts(".turn")) == 4)
    assert sayer.texts(".turn .text")[3].startswith(written.rstrip())
    assert sayer.texts(".figures")[-1] == "interrupted"
    sayer.ask("two s")
    assert sayer.answered() == saying.TEXTS["s"]


@pytest.mark.parametrize(
    "kept",
    [
        "not JSON",
        "null",
        '{"title": "", "messages": 7, "leaf": 0}',
        '{"title": "", "messages": [{"role": "assistant", "content": "x", "parent": -1}], "leaf": 0}',
        '{"title": "", "messages": [{"role": "user", "content": {}, "parent": -1}], "leaf": 0}',
        '{"title": "", "messages": [], "leaf": 4}',
        '{"messages": [7], "start": 0}',
    ],
)
def test_the_page_works_with_invalid_data_in_the_storage(kept: str, sayer: Page) -> None:
    sayer.driver.execute_script(
        "localStorage.setItem('axrun.chat.x', arguments[0]); sessionStorage.setItem('axrun.chat', '\"x\"')", kept
    )
    sayer.reload()
    sayer.ask("one s")
    assert sayer.answered() == saying.TEXTS["s"]


def test_two_tabs_show_one_conversation_and_do_not_overwrite_each_other(sayer: Page, server_saying: Server) -> None:
    driver = sayer.driver
    first = driver.current_window_handle
    sayer.ask("one s")
    sayer.answered()
    driver.switch_to.new_window("tab")
    second = driver.current_window_handle
    driver.get(server_saying.url)
    sayer.until(lambda: len(sayer.texts(".turn")) == 2)
    sayer.ask("two s")
    sayer.answered()
    driver.switch_to.window(first)  # an idle tab follows
    sayer.until(lambda: sayer.texts(".user .text") == ["one s", "two s"])
    sayer.ask("for ever: e")
    sayer.until(lambda: sayer.texts(".writing .text")[-1])
    driver.switch_to.window(second)  # ask here too while the other answer is in progress
    sayer.until(lambda: len(sayer.texts(".turn")) == 6)
    sayer.ask("three s")
    sayer.answered()
    here = sayer.texts(".user .text")
    assert here == ["one s", "two s", "for ever: e", "three s"]
    driver.switch_to.window(first)
    sayer.answered()
    there = sayer.texts(".user .text")
    assert there == ["one s", "two s", "for ever: e"]
    whole = sayer.texts(".assistant .text")[-1]
    for tab, questions in ((first, there), (second, here)):  # both are kept
        driver.switch_to.window(tab)
        driver.refresh()
        sayer.shows(".user .text", *questions)
    driver.switch_to.window(first)
    sayer.until(lambda: sayer.texts(".assistant .text")[-1] == whole)
    assert "interrupted" not in sayer.texts(".figures")


def test_a_full_storage_is_reported(sayer: Page) -> None:
    sayer.ask("one s")
    sayer.answered()
    assert not sayer.find("#unkept").is_displayed()
    sayer.driver.execute_script(
        "let size = 1 << 22; while (size) try { localStorage.setItem('x' + size + Math.random(), 'x'.repeat(size)) }"
        "catch { size >>= 1 }"
    )
    sayer.ask("two s")
    sayer.answered()
    assert sayer.find("#unkept").is_displayed()


def test_the_page_works_without_storage(sayer: Page) -> None:
    forbid = "for (const name of ['localStorage', 'sessionStorage'])"
    forbid += " Object.defineProperty(window, name, {get() { throw new DOMException('', 'SecurityError') }})"
    command = ("Page.addScriptToEvaluateOnNewDocument", {"source": forbid})
    script = sayer.driver.execute_cdp_cmd(*command)["identifier"]
    try:
        sayer.reload()
        sayer.ask("one s")
        assert sayer.answered() == saying.TEXTS["s"]
        assert sayer.find("#unkept").is_displayed()
        sayer.find("#new").click()
        sayer.ask("two s")
        assert sayer.answered() == saying.TEXTS["s"]
        assert sayer.driver.get_log("browser") == []
    finally:
        sayer.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": script})
