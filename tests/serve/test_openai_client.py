"""OpenAI's own Python client, unmodified, against a real server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch

from tests.serve.server import MODEL, Server


def greedy(reference: Any, ids: list[int], count: int) -> list[int]:
    given = torch.tensor([ids])
    out = reference.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return [int(token) for token in out[0, len(ids) :]]


def log_softmax(reference: Any, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Log probabilities after every token, [n, vocab]."""
    with torch.inference_mode():
        return np.asarray(reference(torch.tensor([ids])).logits[0].log_softmax(-1).numpy())


@pytest.fixture
def client(server_fp32: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server_fp32.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_answers_match_transformers(client: openai.OpenAI, reference: Any, hf_tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *ask("12+30=")]
    answer = client.chat.completions.create(model=MODEL, messages=messages, temperature=0)
    ids = hf_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    stop = reference.generation_config.eos_token_id
    expected = [token for token in greedy(reference, ids, 50) if token not in stop]
    assert answer.choices[0].message.content == hf_tokenizer.decode(expected)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(expected))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_gives_the_same_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=ask("who are you?"), temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=ask("who are you?"),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    text = [part.choices[0].delta.content or "" for part in parts]
    assert "".join(text) == whole.choices[0].message.content
    assert len([piece for piece in text if piece]) > 5
    assert [part.choices[0].finish_reason for part in parts][-1] == "stop"
    assert all(part.choices[0].finish_reason is None and part.usage is None for part in parts[:-1])
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_continues(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=ask("1+1="), temperature=0)
    more = [*ask("1+1="), first.choices[0].message, *ask("2+2=")]
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2="}]
    split = [*more[:2], {"role": "user", "content": parts}]
    answers = [
        client.chat.completions.create(model=MODEL, messages=messages, temperature=0) for messages in (more, split)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content != ""
    assert answers[0].usage == answers[1].usage or answers[0].usage is not None


def test_logprobs_match_transformers(client: openai.OpenAI, reference: Any, hf_tokenizer: Any) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ask("who are you?"), temperature=0, logprobs=True, top_logprobs=5
    )
    ids = hf_tokenizer.apply_chat_template(ask("who are you?"), add_generation_prompt=True)["input_ids"]
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    written = hf_tokenizer.encode(answer.choices[0].message.content)
    rows = log_softmax(reference, ids + written)[len(ids) - 1 :]
    assert b"".join(bytes(token.bytes or []) for token in content).decode() == answer.choices[0].message.content
    assert len(content) == len(written)
    for token, id_, row in zip(content, written, rows, strict=False):
        assert token.logprob == pytest.approx(row[id_], abs=1e-3)
        best = np.sort(row)[::-1][:5]
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(list(best), abs=1e-3)
        assert token.token == hf_tokenizer.decode([id_])


def test_echo_scores_the_prompt(client: openai.OpenAI, reference: Any, hf_tokenizer: Any, heldout: str) -> None:
    """Prompts as strings, as token ids, and as lists of either; longer than one prefill chunk."""
    text = heldout[:300]
    ids = hf_tokenizer.encode(text)
    assert len(ids) > 70
    rows = log_softmax(reference, ids)
    expected = [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]
    for prompt in (text, [text, "1+1="], ids, [ids[:20], ids]):
        answer = client.completions.create(
            model=MODEL, prompt=prompt, echo=True, max_tokens=1, logprobs=2, temperature=0
        )
        choice = answer.choices[1 if isinstance(prompt[0], list) else 0]
        scores = choice.logprobs
        assert scores is not None
        logprobs = scores.token_logprobs or []
        assert logprobs[0] is None
        assert logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-3)
        assert len(logprobs) == len(ids) + 1
        assert scores.tokens is not None
        assert scores.text_offset is not None
        assert choice.text.startswith(text)
        assert scores.tokens[: len(ids)] == [hf_tokenizer.decode([token]) for token in ids]
        for offset, token in zip(scores.text_offset, scores.tokens, strict=True):
            assert choice.text[offset:].startswith(token)
        for top, row in zip((scores.top_logprobs or [])[1 : len(ids)], rows, strict=False):
            assert max(top.values()) == pytest.approx(row.max(), abs=1e-3)


def test_the_first_token_of_a_prompt_has_no_score(client: openai.OpenAI) -> None:
    for most in (0, 1):
        answer = client.completions.create(model=MODEL, prompt=[300], echo=True, logprobs=1, max_tokens=most)
        scores = answer.choices[0].logprobs
        assert scores is not None
        assert (scores.token_logprobs or [])[0] is None
        assert len(scores.tokens or []) == 1 + most


def test_max_tokens_0_only_scores(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="7+8=", echo=True, max_tokens=0, logprobs=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("7+8=", "length")
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or []) == 4
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 0)


def test_completions_default_to_16_tokens(client: openai.OpenAI, heldout: str) -> None:
    prompt = heldout[:60]
    default = client.completions.create(model=MODEL, prompt=prompt, temperature=0)
    longer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=40)
    assert (default.usage and default.usage.completion_tokens, default.choices[0].finish_reason) == (16, "length")
    assert longer.choices[0].text.startswith(default.choices[0].text)
    streamed = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=40, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == longer.choices[0].text


def test_streamed_logprobs_equal_unstreamed_ones(client: openai.OpenAI) -> None:
    given: Any = {"model": MODEL, "prompt": "who are", "temperature": 0, "logprobs": 3, "echo": True, "max_tokens": 12}
    whole = client.completions.create(**given).choices[0].logprobs
    assert whole is not None
    parts = [part.choices[0].logprobs for part in client.completions.create(**given, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for part in parts if part for entry in getattr(part, name)] == getattr(whole, name)


def test_a_seed_repeats_an_answer_and_n_gives_several(client: openai.OpenAI, heldout: str) -> None:
    def answers(seed: int, n: int = 1) -> list[str]:
        made = client.completions.create(model=MODEL, prompt=heldout[:40], temperature=2, seed=seed, n=n, max_tokens=60)
        return [choice.text for choice in sorted(made.choices, key=lambda choice: choice.index)]

    assert answers(1) == answers(1) != answers(2)
    three = answers(1, n=3)
    assert three == [*answers(1), *answers(2), *answers(3)]
    assert answers(-5) == answers(-5)


def test_sampling_parameters_narrow_the_choice(client: openai.OpenAI, heldout: str) -> None:
    def answer(**more: Any) -> str:
        given: Any = {"model": MODEL, "prompt": heldout[:40], "max_tokens": 80, "seed": 7, **more}
        return str(client.completions.create(**given).choices[0].text)

    greedy = answer(temperature=0)
    assert answer(temperature=2) != greedy
    assert answer(temperature=2, top_p=0) == answer(temperature=2, extra_body={"top_k": 1}) == greedy
    assert answer(temperature=1e-9) == greedy
    assert answer() == greedy, "the bundle's post_config.json is greedy"
    assert answer(temperature=0, extra_body={"repetition_penalty": 10}) != greedy

    def counts(**more: Any) -> list[int]:
        """Counts of five tokens, when all others are excluded by logit_bias."""
        five = {str(token): 100 for token in range(300, 305)}
        given: Any = {"model": MODEL, "prompt": "Once", "max_tokens": 100, "temperature": 0, "logprobs": 0, **more}
        scores = client.completions.create(**given, logit_bias=five).choices[0].logprobs
        assert scores is not None
        return sorted(Counter(scores.tokens or []).values(), reverse=True)

    plain, penalised = counts(), counts(frequency_penalty=2)
    assert penalised[0] < plain[0]
    assert len(penalised) == 5
    assert len(counts(presence_penalty=2)) >= len(plain)
    first = client.completions.create(model=MODEL, prompt=heldout[:40], max_tokens=1, temperature=0, logprobs=0)
    assert first.choices[0].logprobs is not None
    banned = first.choices[0].logprobs.tokens or []
    assert not answer(temperature=0, logit_bias={str(number): -100 for number in range(300)}).startswith(banned[0])
    assert answer(temperature=0, logit_bias={"5": 100}) == answer(temperature=0, logit_bias={"5": 100.0}) != greedy


def test_errors_become_exceptions_of_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=ask("x"))
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature is 3") as wrong:
        client.chat.completions.create(model=MODEL, messages=ask("x"), temperature=3)
    assert (wrong.value.type, wrong.value.param) == ("invalid_request_error", "temperature")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="1+" * 300)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tool_choice names 'g'"):
        client.chat.completions.create(
            model=MODEL,
            messages=ask("x"),
            tools=[{"type": "function", "function": {"name": "f"}}],
            tool_choice={"type": "function", "function": {"name": "g"}},
        )


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "axrun"
    with pytest.raises(openai.NotFoundError, match="this server has: qwen2"):
        client.models.retrieve("gpt-5")
