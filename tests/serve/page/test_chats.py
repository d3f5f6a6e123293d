"""The list of conversations: search, rename, delete, export, import."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.serve import saying
from tests.serve.page.browser import Page

pytestmark = pytest.mark.system
SHORT = saying.TEXTS["s"]
MESSAGES = [
    {"role": "user", "content": "one s", "parent": -1},
    {"role": "assistant", "content": SHORT, "parent": 0, "reasoning": "Hm.", "thought": 3, "figures": "imported"},
]
CHAT = {"title": "", "messages": MESSAGES, "leaf": 1}


@pytest.fixture
def two(sayer: Page) -> Page:
    """A page with two conversations, and the list of them shown."""
    for question in ("apples s", "pears s"):
        sayer.find("#new").click()
        sayer.ask(question)
        sayer.answered()
    sayer.hotkey("c")
    sayer.until(lambda: titles(sayer) == ["pears s", "apples s"])
    return sayer


def titles(page: Page) -> list[str]:
    return page.texts("#list .title")


def file(*conversations: Any, **more: Any) -> str:
    return json.dumps({"format": "axrun conversations", "version": 1, "conversations": conversations, **more})


def stored(page: Page) -> int:
    script = "return Object.keys(localStorage).filter((key) => key.startsWith('axrun.chat.')).length"
    return int(page.driver.execute_script(script))


def read(page: Page, path: Path, content: str) -> str:
    """Imports a file; returns what the page says."""
    path.write_text(content)
    page.driver.execute_script("document.getElementById('told').textContent = ''")
    page.find("#file").send_keys(str(path))
    return str(page.until(lambda: "".join(page.texts("#told"))))


def test_conversations_are_listed_and_opened(two: Page) -> None:
    assert two.driver.switch_to.active_element == two.find("#search")
    assert two.texts("#list [aria-current] .title") == ["pears s"]
    two.find("#list li:last-child .open").click()
    two.shows(".user .text", "apples s")
    two.reload()
    two.shows(".user .text", "apples s")
    two.ask("more s")
    two.answered()
    two.hotkey("c")
    assert titles(two) == ["apples s", "pears s"]  # the latest first


def test_another_conversation_is_opened_during_an_answer(two: Page) -> None:
    two.ask("for ever: e")
    two.until(lambda: two.texts(".writing .text")[-1:] > [""])
    two.find("#list li:last-child .open").click()
    two.shows(".user .text", "apples s")
    assert two.find("#send").is_displayed()
    two.ask("more s")
    assert two.answered() == SHORT
    two.hotkey("c")
    two.find("#list li:last-child .open").click()
    two.shows(".user .text", "pears s", "for ever: e")
    assert "stopped" in two.texts(".figures")[-1]
    assert saying.TEXTS["e"][:9] in two.texts(".assistant .text")[-1]


def test_titles_and_texts_are_searched(two: Page) -> None:
    for wanted, found in (("APPLE", ["apples s"]), ("short", ["pears s", "apples s"]), ("plums", [])):
        two.find("#search").clear()
        two.find("#search").send_keys(wanted)
        two.until(functools.partial(lambda expected: titles(two) == expected, found))
        assert two.texts("#found") == [f"{len(found)} of 2"]


def test_a_conversation_is_renamed(two: Page) -> None:
    for end, title in ((Keys.ESCAPE, "pears s"), (Keys.ENTER, "<b>Fruit</b>")):
        two.press("Rename pears s")
        two.driver.switch_to.active_element.send_keys("<b>Fruit</b>", end)
        two.until(functools.partial(lambda expected: titles(two)[0] == expected, title))
        assert "open" in two.driver.switch_to.active_element.get_attribute("class")
    two.ask("more s")
    two.answered()
    two.reload()
    two.hotkey("c")
    two.until(lambda: titles(two) == ["<b>Fruit</b>", "apples s"])


def test_a_conversation_is_deleted_after_a_question(two: Page) -> None:
    two.press("Delete pears s")
    two.driver.switch_to.alert.dismiss()
    assert titles(two) == ["pears s", "apples s"]
    two.press("Delete pears s")
    two.driver.switch_to.alert.accept()
    two.until(lambda: titles(two) == ["apples s"])
    assert two.texts(".turn") == []
    assert stored(two) == 1
    two.reload()
    two.until(lambda: two.find("#empty").is_displayed())


def test_what_is_exported_is_imported_again(two: Page, tmp_path: Path) -> None:
    two.hotkey("c")
    two.press("Try again", ".assistant")  # a branch
    two.answered()
    two.hotkey("c")
    two.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    two.find("#export-all").click()
    written = two.until(lambda: list(tmp_path.glob("axrun-chats-*.json")))[0]
    assert two.texts("#told") == ["Exported 2 conversations."]
    whole = json.loads(written.read_text())
    assert [len(chat["messages"]) for chat in whole["conversations"]] == [3, 2]
    assert stored(two) == 2
    two.driver.execute_script("localStorage.clear()")
    assert read(two, tmp_path / "again.json", written.read_text()) == "Imported 2 conversations."
    assert sorted(titles(two)) == ["apples s", "pears s"]
    script = "return Object.entries(localStorage).flatMap(([key, text]) => key.startsWith('axrun.chat') ? [text] : [])"
    known = ("title", "messages", "leaf", "rate")
    found = [json.loads(text) for text in two.driver.execute_script(script)]
    again = [{name: chat[name] for name in known if name in chat} for chat in found]
    assert sorted(map(json.dumps, again)) == sorted(map(json.dumps, whole["conversations"]))
    assert two.driver.get_log("browser") == []


def test_an_import_adds_and_runs_nothing(two: Page, tmp_path: Path) -> None:
    nasty = "<img src=x onerror=window.pwned=1>"
    call = {"id": nasty, "name": nasty, "arguments": nasty}
    messages = [
        {"role": "user", "content": nasty, "parent": -1},
        {
            "role": "assistant",
            "content": saying.NASTY,
            "reasoning": nasty,
            "calls": [call],
            "parent": 0,
            "error": nasty,
        },
        {"role": "tool", "content": nasty, "call": nasty, "name": nasty, "parent": 1},
        {"role": "assistant", "content": nasty, "figures": nasty, "writing": True, "parent": 2},
    ]
    assert (
        read(two, tmp_path / "a", file({"title": nasty, "messages": messages, "leaf": 3})) == "Imported 1 conversation."
    )
    assert titles(two)[0] == nasty
    assert stored(two) == 3
    two.find("#list .open").click()
    two.until(lambda: len(two.texts(".turn")) == 4)
    for summary in two.driver.find_elements("css selector", "details.thoughts summary, .call summary"):
        summary.click()
    assert (
        two.driver.execute_script("return window.pwned ?? document.querySelectorAll('#log img, #list img').length") == 0
    )
    assert nasty in two.texts(".thoughts-text")
    assert two.texts(".figures")[-1] == nasty
    assert two.driver.get_log("browser") == []


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", "the file is not JSON"),
        ("[]", "the file is a list of 0, expected an object"),
        ("[" * 300_000 + "]" * 300_000, "the file is a list of 1, expected an object"),
        (json.dumps({**json.loads(file(CHAT)), "version": 2}), "the file.version is 2, expected 1"),
        (file(CHAT, more=1), 'the file has the unknown field "more"'),
        (file(CHAT).replace('"title"', '"__proto__"'), 'conversations[0] has the unknown field "__proto__"'),
        (file(CHAT, {**CHAT, "leaf": 2}), "conversations[1].leaf is 2, expected the index of a message"),
        (file({**CHAT, "leaf": -1}), "conversations[0].leaf is -1, expected the index of a message"),
        (
            file({**CHAT, "title": "t" * 501}),
            f'conversations[0].title is "{"t" * 39}…, expected a text of up to 500 characters',
        ),
        (
            file({**CHAT, "messages": [{**MESSAGES[0], "parent": 0}]}),
            "conversations[0].messages[0].parent is 0, expected an earlier message",
        ),
        (
            file({**CHAT, "messages": [{**MESSAGES[0], "role": "system"}]}),
            'conversations[0].messages[0].role is "system", expected "user" or "assistant" or "tool"',
        ),
        (
            file({**CHAT, "messages": [*MESSAGES, {**MESSAGES[1], "parent": 1}]}),
            "conversations[0].messages[2] is of role assistant, which cannot follow assistant",
        ),
        (
            file({**CHAT, "messages": [{**MESSAGES[0], "role": "tool"}]}),
            "conversations[0].messages[0] is of role tool, which cannot follow the beginning",
        ),
        (
            file({**CHAT, "messages": [{**MESSAGES[0], "html": "x"}]}),
            'conversations[0].messages[0] has the unknown field "html"',
        ),
        (
            file(
                {**CHAT, "messages": [MESSAGES[0], {**MESSAGES[1], "calls": [{"id": "", "name": 1, "arguments": ""}]}]}
            ),
            "conversations[0].messages[1].calls[0].name is 1, expected a text of up to 500 characters",
        ),
        (
            file({**CHAT, "rate": 1e999}).replace("Infinity", "1e999"),
            "conversations[0].rate is null, expected a positive number",
        ),
        (file(*[CHAT] * 1001), "the file.conversations is a list of 1001, expected a list of up to 1000"),
        (" " * (16 << 20) + "{}", "the file has more than 16 MiB"),
    ],
)
def test_an_import_that_is_not_understood_is_refused_by_name(
    content: str, error: str, sayer: Page, tmp_path: Path
) -> None:
    sayer.hotkey("c")
    said = read(sayer, tmp_path / "import.json", content)
    assert said.startswith(f"Nothing was imported: {error}")
    assert stored(sayer) == 0


def test_an_import_that_does_not_fit_leaves_nothing(sayer: Page, tmp_path: Path) -> None:
    sayer.hotkey("c")
    big = {"title": "", "messages": [{**MESSAGES[0], "content": "x" * 3_000_000}], "leaf": 0}
    said = read(sayer, tmp_path / "import.json", file(big, big, big))
    assert said == "Nothing was imported: the storage of this browser is full or disabled."
    assert stored(sayer) == 0
