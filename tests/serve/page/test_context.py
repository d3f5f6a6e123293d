"""A conversation that outgrows the model's context."""

from __future__ import annotations

import itertools

import pytest

from tests.serve import saying
from tests.serve.page.browser import Page, tokens_read
from tests.serve.server import Server

pytestmark = pytest.mark.system


def test_a_failed_turn_is_not_sent_again(sayer: Page) -> None:
    sayer.ask("one s")
    sayer.answered()
    sayer.ask("a" * 2000)
    sayer.answered()
    assert "this model's context is 1023" in sayer.texts(".error")[0]
    sayer.ask("two s")
    assert sayer.answered() == saying.TEXTS["s"]
    read = tokens_read(sayer.texts(".figures")[-1])
    assert read == len("one s") + len(saying.TEXTS["s"]) + len("two s")


def test_a_conversation_goes_on_past_the_context(page: Page, server_long: Server) -> None:
    """Turns are left out before the context is full, many at a time, so that most prompts find a cached prefix."""
    refused = 'axrun_requests_total{path="/v1/chat/completions",status="400"}'
    before = server_long.metrics().get(refused)
    page.set("max_completion_tokens", "8")
    page.find("#settings-button").click()
    read = []
    for _ in range(7):
        page.ask("1+" * 700 + "1=")
        page.answered()
        read.append(tokens_read(page.texts(".figures")[-1]))
    assert page.texts(".error") == []
    assert server_long.metrics().get(refused) == before
    assert max(read) < 0.75 * 8191
    shorter = [number for number, (one, after) in enumerate(itertools.pairwise(read), 2) if after < one]
    assert shorter == [5]
    assert page.texts(".note") == ["The 3 turns above are left out: the model's context of 8,191 tokens is full."]


def test_left_out_turns_are_marked_and_stay_marked(sayer: Page) -> None:
    for _ in range(6):
        sayer.ask("and then? l")
        assert sayer.answered() == saying.LONG
    assert sayer.texts(".error") == []
    notes = sayer.texts(".note")
    assert len(notes) == 1
    assert "turns above are left out: the model's context of 1,023 tokens is full" in notes[0]
    left_out = len(sayer.texts(".turn.left-out"))
    assert 2 <= left_out < len(sayer.texts(".turn")) == 12
    sayer.reload()
    sayer.until(lambda: len(sayer.texts(".turn")) == 12)
    assert len(sayer.texts(".turn.left-out")) == left_out


def test_oldest_turns_go_when_the_server_finds_the_question_too_long(sayer: Page) -> None:
    """The estimate comes from answers with three or more characters per token; here a character is a token."""
    for _ in range(2):
        sayer.ask("and then? l")
        sayer.answered()
    sayer.ask("b" * 900 + " s")
    assert sayer.answered() == saying.TEXTS["s"]
    assert sayer.texts(".error") == []
    assert sayer.texts(".note") == ["The 2 turns above are left out: the model's context of 1,023 tokens is full."]


def test_the_gauge_shows_how_full_the_context_is(sayer: Page, server_saying: Server) -> None:
    health, listing = server_saying.client.get("/health").json(), server_saying.client.get("/v1/models").json()
    assert health["context_length"] == listing["data"][0]["context_length"] == 1023
    assert not sayer.find("#gauge").is_displayed()
    sayer.ask("one s")
    sayer.answered()
    assert sayer.find("#gauge-text").text == "10 of 1,023 tokens"
    assert float(sayer.find("#gauge-bar").get_property("value")) == 10
    assert float(sayer.find("#gauge-bar").get_property("max")) == 1023
    sayer.ask("for ever: e")
    sayer.answered()
    assert sayer.texts(".figures")[-1].endswith("cut: the context is full")
    assert sayer.find("#gauge-text").text == "1,023 of 1,023 tokens"
