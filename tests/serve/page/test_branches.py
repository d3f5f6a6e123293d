"""Editing, answering again, and switching between the versions of a turn."""

from __future__ import annotations

import json
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from tests.serve import saying
from tests.serve.page.browser import Page

pytestmark = pytest.mark.system
SHORT = saying.TEXTS["s"]
JSON = saying.TEXTS["j"]


def rewrite(page: Page, turn: str, text: str, *end: str) -> None:
    """Edits a turn and saves it, or presses the keys `end`."""
    page.press("Edit", turn)
    area = page.find(f"{turn} textarea")
    area.send_keys(Keys.CONTROL, "a")
    area.send_keys(text, *end)
    if not end:
        page.press("Save" if "assistant" in turn else "Send", turn)


def turns(page: Page) -> list[str]:
    return page.texts(".turn .text")


def stored(page: Page) -> Any:
    script = "return Object.entries(localStorage).find(([key]) => key.startsWith('axrun.chat.'))[1]"
    return json.loads(page.driver.execute_script(script))


def test_an_edited_question_starts_a_branch_and_both_are_kept(sayer: Page) -> None:
    for question in ("one s", "two s"):
        sayer.ask(question)
        sayer.answered()
    rewrite(sayer, ".turn:nth-of-type(1)", "one j")
    sayer.until(lambda: turns(sayer) == ["one j", JSON])
    assert sayer.answered() == JSON
    assert sayer.labels(".versions") == ["Version 2 of 2"]
    sayer.press("Previous version")
    assert turns(sayer) == ["one s", SHORT, "two s", SHORT]
    focused = "return document.activeElement.getAttribute('aria-label')"
    assert sayer.driver.execute_script(focused) == "Next version"  # there is no version before it
    sayer.reload()
    sayer.until(lambda: turns(sayer) == ["one s", SHORT, "two s", SHORT])
    sayer.press("Next version")
    assert turns(sayer) == ["one j", JSON]
    sayer.ask("three s")
    assert sayer.answered() == SHORT
    sayer.press("Previous version")
    sayer.press("Next version")
    assert turns(sayer) == ["one j", JSON, "three s", SHORT]  # the whole branch comes back


def test_an_earlier_answer_is_generated_again_beside_it(sayer: Page) -> None:
    for question in ("one s", "two s"):
        sayer.ask(question)
        sayer.answered()
    sayer.press("Try again", ".turn:nth-of-type(2)")
    sayer.until(lambda: sayer.labels(".assistant .versions") == ["Version 2 of 2"])
    sayer.answered()
    assert turns(sayer) == ["one s", SHORT]
    assert "same answer as before" in sayer.texts(".figures")[0]
    sayer.hotkey(",")
    assert turns(sayer) == ["one s", SHORT, "two s", SHORT]
    sayer.hotkey(".")
    assert turns(sayer) == ["one s", SHORT]


def test_an_edited_answer_is_what_the_model_reads(sayer: Page) -> None:
    sayer.ask("one s")
    sayer.answered()
    rewrite(sayer, ".turn.assistant", "Not <b>short</b>.", Keys.CONTROL, Keys.ENTER, Keys.NULL)
    assert turns(sayer) == ["one s", "Not <b>short</b>."]
    assert sayer.texts(".assistant .figures") == ["edited"]
    sayer.ask("two s")
    sayer.answered()
    read = int(sayer.texts(".figures")[-1].split(" tokens read")[0].split()[-1])
    assert read == len("one sNot <b>short</b>.two s")


def test_an_edit_is_cancelled(sayer: Page) -> None:
    sayer.ask("one s")
    sayer.answered()
    rewrite(sayer, ".turn.user", "other", Keys.ESCAPE)
    assert turns(sayer) == ["one s", SHORT]
    assert sayer.driver.execute_script("return document.activeElement.textContent") == "Edit"
    rewrite(sayer, ".turn.user", " ")  # nothing is left
    assert turns(sayer) == ["one s", SHORT]
    assert len(stored(sayer)["messages"]) == 2


def test_a_conversation_of_version_0_1_is_read(sayer: Page) -> None:
    messages = [{"role": role, "content": text} for role, text in (("user", "one s"), ("assistant", "Yes."))]
    old = {"messages": [*messages, *messages], "start": 2, "version": "v", "parent": None, "saved": 1}
    script = "localStorage.setItem('axrun.chat.x', arguments[0]); sessionStorage.setItem('axrun.chat', '\"x\"')"
    sayer.driver.execute_script(script, json.dumps(old))
    sayer.reload()
    sayer.until(lambda: turns(sayer) == ["one s", "Yes."] * 2)
    assert len(sayer.texts(".turn.left-out")) == 2
    sayer.ask("two s")
    assert sayer.answered() == SHORT


def test_the_functions_of_a_tree(sayer: Page) -> None:
    script = """
    const {create, add, pathOf, versions, choose, titleOf, startOf, shownOf} = it;
    const tree = create();
    const q = add(tree, {role: "user", content: " First line\\nsecond"});
    const a = add(tree, {role: "assistant", content: "a"});
    const q2 = add(tree, {role: "user", content: "q2"}), a2 = add(tree, {role: "assistant", content: "a2", start: 2});
    const b = add(tree, {role: "assistant", content: "b", start: 9}, q);
    const seen = [pathOf(tree), versions(tree, b), startOf(shownOf(tree))];
    choose(tree, a);
    return [...seen, pathOf(tree), startOf(shownOf(tree)), versions(tree, q), titleOf(tree), titleOf(create())];
    """
    assert sayer.module("conversation.js", script) == [
        *([0, 4], [1, 4], 0),
        *([0, 1, 2, 3], 2, [0], "First line", "New chat"),
    ]
