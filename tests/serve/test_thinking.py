"""reasoning_content: thoughts in answers and in the history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from axrun.format.bundle import Bundle
from axrun.sampling import Sampling
from axrun.sampling.grammar import Compiler
from axrun.serve.order import Reader
from axrun.serve.tools import Toolbox
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer
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


@pytest.mark.parametrize(
    ("source", "on", "off"),
    [
        ("{% if thinking %}1+1={% endif %}", True, False),
        ("{% if thinking_budget == 0 %}{% else %}1+1={% endif %}", None, 0),
        ("{% if reasoning_effort == 'none' %}{% else %}1+1={% endif %}", None, "none"),
        ("{% if '/no_think' in messages[0].content %}{% else %}1+1={% endif %}", None, "/no_think"),
    ],
)
def test_requests_reach_the_switch_of_the_template(bundle_s8: Path, source: str, on: Any, off: Any) -> None:
    bundle = Bundle.open(bundle_s8)
    tokenizer = Tokenizer.open(bundle.hf)
    turns = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(turns + source, {})
    toolbox = Toolbox(template, tokenizer)
    reader = Reader(tokenizer, template, Sampling(), Compiler(tokenizer, bundle.vocab_size), toolbox, bundle)

    def tokens(**body: Any) -> int:
        return len(reader.chat({"messages": [{"role": "user", "content": "who?"}], **body}).choices[0].ids)

    short, long = tokens(enable_thinking=False), tokens(enable_thinking=True)
    assert short < long
    assert tokens() == (short if on else long)
    assert tokens(reasoning_effort="none") == tokens(chat_template_kwargs={"enable_thinking": False}) == short
    assert tokens(enable_thinking=True, reasoning_effort="low") == long
    name = next((name for name in ("thinking", "thinking_budget", "reasoning_effort") if name in template.variables), 0)
    if name:  # the template's own name wins
        assert tokens(enable_thinking=True, chat_template_kwargs={name: off}) == short
