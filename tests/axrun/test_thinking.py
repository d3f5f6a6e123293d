"""Thoughts are separated from answers, and limited by a budget."""

from __future__ import annotations

import numpy as np
import pytest

from axrun.sampling import Sampling
from axrun.sampling.budget import Budget
from axrun.sampling.sampler import Sampler
from axrun.text.template import ChatTemplate
from axrun.text.thinking import Thinking, marks_of

MARKS = ("<think>", "</think>")
# (the prompt ends with the mark, answer, thoughts, text)
ANSWERS = [
    (False, "<think>\nHm.\n\nSo.\n</think>\n\nTwo. \n", "Hm.\n\nSo.", "Two. \n"),
    (False, "\n<think>Hm.</think>Two.", "Hm.", "Two."),
    (True, "Hm. </think> Two.", "Hm.", "Two."),
    (True, "\n</think>\nTwo.", "", "Two."),
    (False, "<think>\n\n</think>\n\nTwo.", "", "Two."),
    (False, "<think>cut off </thi", "cut off </thi", ""),
    (True, "cut off ", "cut off", ""),
    (False, " Two <think> or </think> three. ", "", " Two <think> or </think> three. "),
    (False, "<thin ice", "", "<thin ice"),
    (False, "<thi", "", "<thi"),
    (False, "", "", ""),
    (True, "a < b </think> c </think> d", "a < b", "c </think> d"),
]


@pytest.mark.parametrize("step", [100, 1, 3])
@pytest.mark.parametrize(("open", "answer", "thoughts", "text"), ANSWERS)
def test_thoughts_are_apart_from_the_text(open: bool, answer: str, thoughts: str, text: str, step: int) -> None:
    stream = Thinking(*MARKS, open).stream()
    parts = [stream.push(answer[at : at + step]) for at in range(0, len(answer), step)] + [stream.finish()]
    assert ("".join(part[0] for part in parts), "".join(part[1] for part in parts)) == (thoughts, text)


def test_thoughts_are_streamed() -> None:
    stream = Thinking(*MARKS).stream()
    assert [stream.push(text) for text in ("<think>", "\nHm", " so", "</", "think>", "\n", "Two")] == [
        *(("", ""), ("Hm", ""), (" so", ""), ("", ""), ("", ""), ("", ""), ("", "Two"))
    ]


def test_only_templates_with_marks_have_thoughts() -> None:
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert marks_of(ChatTemplate(turns, {})) is None
    assert marks_of(ChatTemplate(turns + "{{ m.content.split('</think>')[-1] }}", {})) == MARKS
    assert marks_of(ChatTemplate(turns + "[THINK]", {})) == ("[THINK]", "[/THINK]")


BEGIN, END = 7, 8


@pytest.mark.parametrize(
    ("begin", "answer", "forced"),
    [
        (None, [1, 2], False),
        (None, [1, 2, 3], True),
        (None, [1, 2, END], False),
        (None, [1, 2, END, 3, 4, 5], False),
        (BEGIN, [], False),
        (BEGIN, [BEGIN, 1, 2], False),
        (BEGIN, [BEGIN, 1, 2, 3], True),
        (BEGIN, [1, 2, 3, 4], False),
        (BEGIN, [BEGIN, END, 1, 2, 3, 4], False),
    ],
)
def test_a_spent_budget_leaves_only_the_end_of_the_thoughts(begin: int | None, answer: list[int], forced: bool) -> None:
    logits = np.arange(10, 0, -1, dtype=np.float32)
    for temperature in (0.0, 1.0):
        sampler = Sampler(Sampling(temperature, budget=Budget(3, begin, END)), seed=1)
        tokens = {sampler(logits, [9, 9, *answer], 2) for _ in range(5)}
        assert (tokens == {END}) == forced
