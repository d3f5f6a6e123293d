"""Asking, streaming, stopping, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.serve.page.browser import Page, tokens_read
from tests.serve.server import Server, Start

pytestmark = pytest.mark.system


def test_a_question_is_answered(page: Page, server_long: Server) -> None:
    assert page.find("#empty").is_displayed()
    assert not page.find("#as-text").is_displayed()
    assert not page.find("#send").is_enabled()
    page.ask("who are you?")
    answer = page.answered()
    assert answer == server_long.chat("who are you?")["choices"][0]["message"]["content"]
    assert page.texts(".user .text") == ["who are you?"]
    assert " tok/s" in page.texts(".figures")[0]
    assert not page.find("#empty").is_displayed()
    assert page.driver.switch_to.active_element == page.find("#prompt")
    assert page.driver.get_log("browser") == []


def test_a_second_question_follows_the_first(page: Page) -> None:
    page.ask("1+1=")
    assert page.answered() == "2"
    page.ask("2+2=")
    page.answered()
    first, second = map(tokens_read, page.texts(".figures"))
    assert second > first
    assert len(page.texts(".turn")) == 4


def test_a_streaming_answer_is_shown_and_stop_keeps_the_text(sayer: Page, server_saying: Server) -> None:
    cancelled = server_saying.metrics()["axrun_cancelled_total"]
    for stop in (lambda: sayer.type(Keys.ESCAPE), lambda: sayer.find("#stop").click()):
        sayer.ask("tell me a long tale")
        seen: set[str] = set()
        while len(seen) < 4:
            seen.add(sayer.until(lambda: sayer.texts(".writing .text")[-1]))
        sayer.until(lambda: len(sayer.texts(".writing .text")[-1]) > 1000)
        assert sayer.driver.execute_script("return log.scrollHeight - log.scrollTop - log.clientHeight") < 60
        stop()
        answer = sayer.answered()
        assert all(answer.startswith(part.rstrip()) for part in seen)
        assert "stopped" in sayer.texts(".figures")[-1]
    assert server_saying.idle()["axrun_cancelled_total"] == cancelled + 2


def test_reload_keeps_the_conversation_and_new_chat_starts_another(page: Page) -> None:
    page.ask("12+30=")
    answer = page.answered()
    plain = tokens_read(page.texts(".figures")[0])
    page.set("system", "Be brief, and say nothing else.")
    page.reload()
    page.until(lambda: page.texts(".turn .text") == ["12+30=", answer])
    assert page.find("#system").get_attribute("value") == "Be brief, and say nothing else."
    page.press("Try again")
    assert page.answered() == answer
    assert tokens_read(page.texts(".figures")[0]) != plain
    page.find("#new").click()
    assert page.texts(".turn") == []
    page.reload()
    page.until(lambda: page.find("#empty").is_displayed())
    assert page.texts(".turn") == []


def test_an_error_is_shown_and_can_be_tried_again(page: Page) -> None:
    page.ask("1+" * 4200)
    page.answered()
    assert "this model's context is 8191" in page.texts(".error")[0]
    page.find("#new").click()
    page.set("temperature", "9")
    page.ask("1+1=")
    page.answered()
    assert page.texts(".error") == ["temperature is 9; expected at most 2."]
    page.set("temperature", "0")
    page.press("Try again")
    page.until(lambda: page.texts(".assistant .text") == ["2"])
    assert page.texts(".error") == []


def test_a_missing_key_and_an_unreachable_server_are_reported(driver: Any, bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, AXRUN_API_KEY="open-sesame").ready()
    driver.get(server.url)
    page = Page(driver)
    page.until(lambda: page.find("#name").text == "qwen2")
    page.ask("1+1=")
    page.answered()
    assert "API key" in page.texts(".error")[0]
    assert page.find("#settings").is_displayed()
    page.set("key", "open-sesame")
    page.press("Try again")
    page.until(lambda: page.texts(".assistant .text") == ["2"])
    server.stop()
    page.ask("1+2=")
    page.answered()
    assert page.texts(".error") == ["The server cannot be reached."]
