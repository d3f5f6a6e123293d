"""reasoning_content: thoughts in answers and in the history."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.server import Server, events


@pytest.mark.parametrize(
    ("text", "body", "thoughts", "content"),
    [
        ("t", {}, "Hm, so.\n\nWell.", "It is two."),
        ("t", {"enable_thinking": True}, "Oh, easy!", "It is four."),
        ("s", {}, None, "A short answer."),
    ],
)
def test_thoughts_are_apart(
    thinker: Server, text: str, body: dict[str, Any], thoughts: str | None, content: str
) -> None:
    message = thinker.chat(text, **body)["choices"][0]["message"]
    assert (message.get("reasoning_content"), message["content"]) == (thoughts, content)
    ask = [{"role": "user", "content": text}]
    with thinker.stream("chat/completions", messages=ask, temperature=0, **body) as response:
        response.read()
        *chunks, _ = events(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == (thoughts or "")
    assert "".join(delta.get("content", "") for delta in deltas) == content


def test_thoughts_without_marks_in_the_template_stay_text(server_saying: Server) -> None:
    message = server_saying.chat("t")["choices"][0]["message"]
    assert message["content"].startswith("<think>")
    assert "reasoning_content" not in message


def test_earlier_thoughts_reach_the_template(thinker: Server) -> None:
    def tokens(**more: str) -> int:
        turns = [{"role": "user", "content": "s"}, {"role": "assistant", "content": "A.", **more}]
        body = thinker.post("chat/completions", messages=[*turns, {"role": "user", "content": "s"}], max_tokens=1)
        return int(body.json()["usage"]["prompt_tokens"])

    assert tokens(reasoning_content="Hm.") == tokens(reasoning="Hm.") == tokens() + 3


def test_a_budget_that_cannot_be_kept_is_refused(thinker: Server, server: Server) -> None:
    """The marks are several tokens here, or the template has none."""
    for one in (thinker, server):
        error = one.post("chat/completions", messages=[{"role": "user", "content": "s"}], thinking_budget=5)
        assert (error.status_code, error.json()["error"]["param"]) == (400, "thinking_budget")
