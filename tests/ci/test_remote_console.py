"""An answer of a board and the remarks on it, on one terminal."""

from __future__ import annotations

from ci.device.remote_axrun import Console


def terminal() -> tuple[Console, list[str]]:
    shown: list[str] = []
    return Console(shown.append, shown.append), shown


def test_remarks_wait_for_the_end_of_a_line() -> None:
    console, shown = terminal()
    console.remark("LLM init ok\n")
    console.answer("4")
    console.remark("ttft: 69.19 ms\n")
    console.remark("hit eos,avg 85.72 token/s\n")
    assert shown == ["LLM init ok\n", "4"]
    console.answer("2\n")
    console.finish()
    assert "".join(shown) == "LLM init ok\n42\nttft: 69.19 ms\nhit eos,avg 85.72 token/s\n"


def test_an_answer_of_several_lines() -> None:
    console, shown = terminal()
    console.answer("one\n")
    console.remark("ttft: 1 ms\n")
    console.answer("two")
    console.answer("\n")
    console.finish()
    assert shown == ["one\n", "ttft: 1 ms\n", "two", "\n"]


def test_a_connection_lost_inside_a_line() -> None:
    console, shown = terminal()
    console.answer("4")
    console.remark("Connection closed\n")
    console.finish()
    assert "".join(shown) == "4\nConnection closed\n"
