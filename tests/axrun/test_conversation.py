"""Conversations compared with transformers' template, tokenizer and greedy answers; reuse of the KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from axrun.chat.conversation import Conversation, Stopped
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer

QUESTIONS = ["my name is Anna", "what is my name?", "1+1=", "where do you run?"]


@pytest.fixture
def conversation(bundle_fp32: Any, model_fp32: Model) -> Conversation:
    return converse(bundle_fp32, model_fp32)


def converse(bundle: Any, model: Model, **options: Any) -> Conversation:
    hf = Bundle.open(bundle).hf
    tokenizer, template = Tokenizer.find(hf), ChatTemplate.find(hf)
    assert tokenizer
    assert template
    return Conversation(model, tokenizer, template, Sampling(), **options)


def said(conversation: Conversation, question: str) -> str:
    return "".join(conversation.ask(question)[1])


def prompt(hf_tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The prompt of a conversation in transformers, with the generation prompt."""
    text = hf_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(hf_tokenizer(text, add_special_tokens=False)["input_ids"])


def theirs(reference: Any, hf_tokenizer: Any, messages: list[dict[str, str]], most: int = 200) -> str:
    """transformers' greedy answer to the whole conversation, without a cache."""
    ids = torch.tensor([prompt(hf_tokenizer, messages)])
    out = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=most)
    return str(hf_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_answers_match_transformers_without_a_cache(
    conversation: Conversation, reference: Any, hf_tokenizer: Any
) -> None:
    messages: list[dict[str, str]] = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = said(conversation, question)
        assert answer == theirs(reference, hf_tokenizer, messages)
        messages.append({"role": "assistant", "content": answer})
    assert conversation.messages == messages


def test_only_new_tokens_are_prefilled(conversation: Conversation, hf_tokenizer: Any) -> None:
    messages: list[dict[str, str]] = []
    before: list[int] = []
    for number, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        whole = prompt(hf_tokenizer, messages)
        turn, pieces = conversation.ask(question)
        messages.append({"role": "assistant", "content": "".join(pieces)})
        assert turn.reused == len(before)
        assert turn.stats.prompt_tokens == len(whole) - len(before)
        assert turn.stats.stop == "eos"
        if number:
            assert turn.stats.prompt_tokens < len(whole) - 20
        before = whole + list(hf_tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"])
        assert conversation.length == len(before)


def test_after_undo_the_same_question_prefills_one_token(conversation: Conversation) -> None:
    first = said(conversation, QUESTIONS[0])
    second = said(conversation, QUESTIONS[2])
    assert conversation.undo() == QUESTIONS[2]
    assert [message["content"] for message in conversation.messages] == [QUESTIONS[0], first]
    turn, pieces = conversation.ask(QUESTIONS[2])
    assert "".join(pieces) == second
    assert turn.stats.prompt_tokens == 1
    assert conversation.undo() == QUESTIONS[2]
    assert conversation.undo() == QUESTIONS[0]
    assert conversation.undo() is None


def test_reset_keeps_the_system_message_only(conversation: Conversation, reference: Any, hf_tokenizer: Any) -> None:
    conversation.system = "Your name is Anna."
    said(conversation, QUESTIONS[0])
    conversation.reset()
    messages = [{"role": "system", "content": "Your name is Anna."}, {"role": "user", "content": "who are you?"}]
    turn, pieces = conversation.ask("who are you?")
    assert "".join(pieces) == theirs(reference, hf_tokenizer, messages)
    assert 0 < turn.reused < len(prompt(hf_tokenizer, messages))
    assert len(conversation.messages) == 2


def test_a_new_system_message_keeps_the_turns(conversation: Conversation, reference: Any, hf_tokenizer: Any) -> None:
    answer = said(conversation, QUESTIONS[0])
    conversation.system = "Your name is Anna."
    messages = [
        {"role": "system", "content": "Your name is Anna."},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "what is my name?"},
    ]
    assert said(conversation, "what is my name?") == theirs(reference, hf_tokenizer, messages)


def test_a_system_message_that_the_template_refuses_changes_nothing(bundle_fp32: Any, model_fp32: Model) -> None:
    tokenizer = Tokenizer.find(Bundle.open(bundle_fp32).hf)
    assert tokenizer
    template = ChatTemplate(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages }}", {}
    )
    conversation = Conversation(model_fp32, tokenizer, template)
    with pytest.raises(BadInput, match="no system"):
        conversation.system = "x"
    assert conversation.system is None


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_stopped_answer_is_kept(pieces: int, conversation: Conversation, reference: Any, hf_tokenizer: Any) -> None:
    calls = 0

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls > pieces:
            raise Stopped

    turn, text = conversation.ask("where do you run?", between)
    answer = "".join(text)
    assert turn.stats.stop == "stopped"
    assert turn.stats.tokens == pieces
    messages = [
        {"role": "user", "content": "where do you run?"},
        {"role": "assistant", "content": answer},
    ]
    assert theirs(reference, hf_tokenizer, messages[:1]).startswith(answer)
    assert conversation.messages == messages
    messages.append({"role": "user", "content": "1+1="})
    assert said(conversation, "1+1=") == theirs(reference, hf_tokenizer, messages)


def test_a_stop_during_prefill_drops_the_question(
    conversation: Conversation, reference: Any, hf_tokenizer: Any
) -> None:
    said(conversation, QUESTIONS[0])
    messages, length = list(conversation.messages), conversation.length

    def between() -> None:
        raise Stopped

    turn, text = conversation.ask("one two three four five six seven eight nine ten eleven twelve " * 2, between)
    assert list(text) == [""]
    assert turn.stats.tokens == 0
    assert conversation.messages == messages
    assert length < conversation.length < length + turn.stats.prompt_tokens  # stopped between chunks
    asked = [*map(dict, messages), {"role": "user", "content": QUESTIONS[1]}]
    again, text = conversation.ask(QUESTIONS[1])
    assert "".join(text) == theirs(reference, hf_tokenizer, asked)
    assert again.reused >= length


def test_an_abandoned_answer_leaves_the_cache_consistent(
    conversation: Conversation, reference: Any, hf_tokenizer: Any
) -> None:
    _, pieces = conversation.ask("where do you run?")
    next(pieces)
    del pieces
    assert conversation.messages == []
    assert said(conversation, "1+1=") == theirs(reference, hf_tokenizer, [{"role": "user", "content": "1+1="}])


def test_the_last_token_of_a_cut_answer_is_prefilled_with_the_next_turn(
    bundle_fp32: Any, model_fp32: Model, reference: Any, hf_tokenizer: Any
) -> None:
    """It was sampled and shown, but did not go through the layers."""
    conversation = converse(bundle_fp32, model_fp32, max_tokens=3)
    messages = [{"role": "user", "content": "where do you run?"}]
    before = len(prompt(hf_tokenizer, messages))
    turn, pieces = conversation.ask("where do you run?")
    messages.append({"role": "assistant", "content": "".join(pieces)})
    assert (turn.stats.stop, turn.stats.tokens) == ("length", 3)
    assert conversation.length == before + 2
    messages.append({"role": "user", "content": "who are you?"})
    turn, pieces = conversation.ask("who are you?")
    assert turn.reused == before + 2
    assert "".join(pieces) == theirs(reference, hf_tokenizer, messages, 3)


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_message(
    bundle_fp32: Any, model_fp32: Model, reference: Any, hf_tokenizer: Any
) -> None:
    conversation = converse(bundle_fp32, model_fp32, max_tokens=24)
    conversation.system = "Your name is Anna."
    system = {"role": "system", "content": "Your name is Anna."}
    everything: list[dict[str, str]] = []
    forgotten = 0
    for number in range(18):
        question = {"role": "user", "content": f"what is {number}+{number + 1}?"}
        turn, pieces = conversation.ask(question["content"])
        answer = "".join(pieces)
        forgotten += turn.forgotten
        kept = everything[2 * forgotten :]
        asked = [system, *kept, question]
        assert answer == theirs(reference, hf_tokenizer, asked, 24)
        ids = prompt(hf_tokenizer, asked)
        assert len(ids) + 24 <= 255
        if turn.forgotten:  # no more turns were dropped than necessary
            dropped = [system, *everything[2 * (forgotten - 1) :], question]
            assert len(prompt(hf_tokenizer, dropped)) + 24 > 255
        everything += [question, {"role": "assistant", "content": answer}]
        assert conversation.messages == everything[2 * forgotten :]
    assert forgotten >= 3


def test_a_question_that_does_not_fit_alone_changes_nothing(conversation: Conversation) -> None:
    said(conversation, "1+1=")
    messages = list(conversation.messages)
    with pytest.raises(BadInput, match=r"\d+ tokens do not fit the context of 255"):
        conversation.ask("1+" * 300)
    assert conversation.messages == messages
    assert said(conversation, "2+2=") == "4"


def test_the_reserve_depends_on_max_tokens(bundle_fp32: Any, model_fp32: Model) -> None:
    assert converse(bundle_fp32, model_fp32).reserve == 63
    assert converse(bundle_fp32, model_fp32, max_tokens=10).reserve == 10
    assert converse(bundle_fp32, model_fp32, max_tokens=1000).reserve == 127


def test_the_repetition_penalty_covers_earlier_turns(bundle_fp32: Any, model_fp32: Model) -> None:
    """In the second turn most of the prompt is cached, and must be penalised all the same."""
    hf = Bundle.open(bundle_fp32).hf
    tokenizer, template = Tokenizer.find(hf), ChatTemplate.find(hf)
    assert tokenizer
    assert template
    answers = []
    for fresh in (False, True):
        conversation = Conversation(model_fp32, tokenizer, template, Sampling(repetition_penalty=50), 30)
        conversation.messages = [
            {"role": "user", "content": "where do you run?"},
            {"role": "assistant", "content": "On a board."},
        ]
        if not fresh:
            said(conversation, "1+1=")
            conversation.undo()
        turn, pieces = conversation.ask("where do you run?")
        assert (turn.reused == 0) == fresh
        answers.append("".join(pieces))
    assert answers[0] == answers[1]
