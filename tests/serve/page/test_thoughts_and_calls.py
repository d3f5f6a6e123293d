"""Thoughts and tool calls in answers, and the results of calls."""

from __future__ import annotations

import json

import pytest

from tests.serve import saying
from tests.serve.page.browser import Page

pytestmark = pytest.mark.system
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def test_thoughts_are_a_collapsed_section(sayer: Page) -> None:
    sayer.ask("one t")
    assert sayer.answered() == "It is two."
    thoughts = sayer.find(".thoughts")
    assert thoughts.get_property("open") is False
    assert sayer.texts(".thoughts summary")[0].startswith("Thoughts, 0.")
    assert not sayer.find(".thoughts-text").is_displayed()
    sayer.find(".thoughts summary").click()
    assert sayer.texts(".thoughts-text") == ["Hm, so.\n\nWell."]
    sayer.ask("two s")  # the turn is drawn again
    sayer.answered()
    assert sayer.find(".thoughts").get_property("open") is True
    assert sayer.driver.get_log("browser") == []


def test_thoughts_grow_as_they_stream_and_can_be_turned_off(sayer: Page) -> None:
    """With thinking on, the prompt ends with <think>, and so the model goes on for the text of ">"."""
    sayer.set("thinking", "on")
    sayer.ask("one s")
    assert sayer.answered() == "It is four."
    assert sayer.driver.execute_script("return document.querySelector('.thoughts-text').textContent") == "Oh, easy!"
    sayer.set("thinking", "off")
    sayer.ask("one s")
    assert sayer.answered() == saying.TEXTS["s"]
    script = """
    const {turnOf, Drawing} = it;
    const message = {role: "assistant", content: "", writing: true, reasoning: "<img src=x onerror=pwned=1>"};
    const turn = turnOf(message), drawing = new Drawing(turn, message), seen = [];
    const look = () => { drawing.draw(); seen.push(turn.innerText); };
    document.getElementById("log").append(turn);
    turn.querySelector(".thoughts").open = true;
    look(); message.reasoning += " more"; look(); message.content = "Done."; message.thought = 1234; look();
    message.calls = [{id: "1", name: "<b>f</b>", arguments: "{\\"a\\": 1}"}]; look();
    turn.remove();
    return seen;
    """
    seen = sayer.module("turn.js", script)
    assert seen[0] == "Thinking…\n<img src=x onerror=pwned=1>"
    assert seen[1] == "Thinking…\n<img src=x onerror=pwned=1> more"
    assert seen[2] == "Thoughts, 1.2 s\n<img src=x onerror=pwned=1> more\n\nDone."
    assert seen[3] == f"{seen[2]}\n\nCall of <b>f</b>"


def test_calls_are_shown_and_their_results_sent(sayer: Page) -> None:
    sayer.set("tools", json.dumps([WEATHER]))
    sayer.find("#settings-button").click()
    sayer.ask("in Paris and Rome: c")
    assert sayer.answered() == "Let me see."
    assert sayer.texts(".call summary") == ["Call of weather"] * 2
    sayer.find(".call summary").click()
    assert json.loads(sayer.texts(".call pre")[0]) == {"city": "Paris"}
    assert sayer.texts(".results label") == ["Result of weather (call 1)", "Result of weather (call 2)"]
    for area, text in zip(
        sayer.driver.find_elements("css selector", ".results textarea"), ("sun", "rain"), strict=True
    ):
        area.send_keys(text)
    sayer.press("Send results")
    sayer.until(lambda: len(sayer.texts(".turn")) == 5)
    assert "It is four." in sayer.answered()  # without a template for tools, results are in <tool_response>
    assert sayer.texts(".results") == []
    assert sayer.texts(".tool summary") == ["Result of weather"] * 2
    sayer.press("Edit", ".turn:nth-of-type(3)")
    sayer.find(".turn:nth-of-type(3) textarea").send_keys("ny")
    sayer.press("Send", ".editor")
    sayer.until(lambda: sayer.labels(".tool .versions") == ["Version 2 of 2"])
    sayer.answered()
    contents = "return [...document.querySelectorAll('.tool pre')].map((pre) => pre.textContent)"
    assert sayer.driver.execute_script(contents) == ["sunny", "rain"]
    sayer.reload()
    sayer.until(lambda: len(sayer.texts(".turn")) == 5)
    assert sayer.driver.execute_script(contents) == ["sunny", "rain"]
    assert sayer.driver.get_log("browser") == []


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("tools", "{}", "Settings: Tools must be JSON, a list."),
        ("further", "[", "Settings: Further request fields must be JSON, an object."),
        ("further", '{"n": 2}', "Settings: the further request fields may not set n, which the page sets."),
        ("further", '{"stop": "short"}', None),
    ],
)
def test_settings_that_are_json_are_checked(field: str, value: str, error: str | None, sayer: Page) -> None:
    sayer.set(field, value)
    sayer.ask("one s")
    answer = sayer.answered()
    assert sayer.texts(".error") == ([] if error is None else [error])
    assert answer == ("A" if error is None else "")


def test_thoughts_are_sent_only_within_the_last_turn(sayer: Page) -> None:
    script = """
    const call = {id: "1", name: "f", arguments: "{}"};
    const turn = [{role: "user", content: "q"}, {role: "assistant", content: "", reasoning: "hm", calls: [call]},
                  {role: "tool", content: "r", call: "1"}];
    const end = {role: "assistant", content: "a", reasoning: "so"};
    const failed = [{role: "user", content: "x"}, {role: "assistant", content: " "}];
    const open = {role: "assistant", content: ""};
    const whole = it.toSend([...turn, end, ...failed, ...turn, open], 0, "be kind");
    return [whole, it.toSend([...turn, end, ...turn], 4, "")];
    """
    whole, rest = sayer.module("context.js", script)
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    question, result = {"role": "user", "content": "q"}, {"role": "tool", "content": "r", "tool_call_id": "1"}
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    thought = [question, {**asked, "reasoning_content": "hm"}, result]
    assert whole == [
        *({"role": "system", "content": "be kind"}, question, asked, result, {"role": "assistant", "content": "a"}),
        *thought,
    ]
    assert rest == thought
