"""Reuse of the KV cache: the longest prefix is reused, and answers depend on the request only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.memory import refuse
from axrun.model import Model
from axrun.serve.slots import Slot, allocate
from tests.serve.server import Start as Starter


@pytest.fixture(scope="module")
def model(bundle_s8: Path) -> Model:
    """bfloat16, prefill in chunks of 32 with histories 0, 32 and 128, a context of 255."""
    return Model.load(Bundle.open(bundle_s8), threads=1)


@pytest.fixture(scope="module")
def ids(hf_tokenizer: Any, heldout: str) -> list[int]:
    return list(hf_tokenizer.encode(heldout)[:255])


def slot_of(model: Model) -> Slot:
    return Slot(model.another())


def start(slot: Slot, ids: list[int], reused: int) -> Iterator[Any]:
    slot.truncate(reused)
    return slot.extend(ids[reused:])


def logits(model: Model, slot: Slot, ids: list[int], then: list[int]) -> list[Any]:
    """The logits after the prompt and after each following token."""
    for hidden in start(slot, ids, slot.reusable(ids)):
        last = model.post(hidden[-1:]).copy()
    return [last, *(model.post(hidden).copy() for token in then for hidden in slot.extend([token]))]


@pytest.mark.parametrize(
    ("cached", "written", "prompt", "reused"),
    [
        (100, 0, 120, 100),  # in the middle of a chunk
        (100, 30, 130, 129),  # decoded tokens too
        (96, 0, 96, 95),  # the logits of the last token are needed
        (97, 0, 97, 96),
        (40, 0, 33, 32),
        (31, 10, 60, 40),
        (200, 0, 220, 200),
        (150, 50, 220, 199),
        (255, 0, 255, 254),
        (100, 0, 20, 19),
    ],
)
def test_reuse_is_exact_to_the_last_bit(
    model: Model, ids: list[int], cached: int, written: int, prompt: int, reused: int
) -> None:
    slot = slot_of(model)
    logits(model, slot, ids[:cached], ids[cached : cached + max(written - 1, 0)])
    assert slot.reusable(ids[:prompt]) == reused
    follow = ids[prompt : prompt + 4]
    alone = logits(model, slot_of(model), ids[:prompt], follow)
    again = logits(model, slot, ids[:prompt], follow)
    for one, other in zip(alone, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("cached", "written", "prompt"), [(100, 0, 120), (100, 30, 140), (31, 10, 60), (200, 20, 255), (100, 0, 100)]
)
def test_only_new_tokens_are_computed(model: Model, ids: list[int], cached: int, written: int, prompt: int) -> None:
    slot = slot_of(model)
    logits(model, slot, ids[:cached], ids[cached : cached + written])
    reused = slot.reusable(ids[:prompt])
    assert reused == min(cached + written, prompt - 1)
    assert sum(len(hidden) for hidden in start(slot, ids[:prompt], reused)) == prompt - reused


def test_a_further_turn_prefills_only_new_tokens(bundle_s8: Path, start: Starter) -> None:
    """Over HTTP, with another conversation that shares only the beginning of the template."""
    server = start(bundle_s8, "--slots", 2).ready()
    messages: list[dict[str, str]] = []
    cached, prompts = [], []
    for question in ("1+1=", "2+2=", "17+25="):
        messages.append({"role": "user", "content": question})
        answer = server.post("chat/completions", messages=messages, temperature=0).json()
        messages.append(answer["choices"][0]["message"])
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        prompts.append(answer["usage"]["prompt_tokens"])
        server.chat("tell me about the river")
    assert [message["content"] for message in messages[1::2]] == ["2", "4", "42"]
    for number in (1, 2):
        assert cached[number] >= prompts[number - 1]
        assert prompts[number] - cached[number] < 30


def test_a_common_prefix_is_reused_and_the_rest_is_not(model: Model, ids: list[int]) -> None:
    slot, other = slot_of(model), ids[:70] + [token ^ 1 for token in ids[70:140]]
    logits(model, slot, ids[:150], [])
    assert slot.reusable(other) == 70
    for one, again in zip(logits(model, slot_of(model), other, []), logits(model, slot, other, []), strict=True):
        np.testing.assert_array_equal(one, again)
    assert slot.reusable(ids[:150]) == 70, "replaced tokens are no longer in the cache"


def test_an_interrupted_prefill_keeps_its_finished_chunks(model: Model, ids: list[int]) -> None:
    slot = slot_of(model)
    chunks = start(slot, ids[:200], 0)
    next(chunks)
    next(chunks)
    del chunks
    assert (slot.length, slot.reusable(ids[:200])) == (64, 64)
    alone, again = logits(model, slot_of(model), ids[:200], []), logits(model, slot, ids[:200], [])
    np.testing.assert_array_equal(alone[0], again[0])


def test_a_reset_clears_the_rows_of_a_failed_step(model: Model, ids: list[int]) -> None:
    slot = slot_of(model)
    logits(model, slot, ids[:50], [])
    slot.model.decoder.cache.keys[0][:, 50:] = 0x7FC0  # a bfloat16 NaN
    slot.reset()
    assert (slot.length, slot.reusable(ids[:50])) == (0, 0)
    alone, again = logits(model, slot_of(model), ids[:250], []), logits(model, slot, ids[:250], [])
    np.testing.assert_array_equal(alone[0], again[0])


def test_slots_share_the_memory_that_is_free(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    each = 256 * 2 * model.decoder.kv_size * 2 * len(model.decoder.sessions)  # 4 blocks of 64 tokens
    said: list[str] = []

    def blocks(free: int | None, slots: int, mb: int | None = None, allow: Any = refuse, held: int = 0) -> int:
        monkeypatch.setattr("axrun.serve.slots.available", lambda: None if free is None else (64 << 20) + free)
        made = allocate(model, slots, allow, None if mb is None else mb << 20, said.append, held)
        assert len(made) == slots
        assert made[0].pool is not None
        return made[0].pool.count

    assert (blocks(11 * each, 11), blocks(None, 12), said) == (44, 48, [])
    assert (blocks(11 * each, 12), said) == (
        44,
        ["note: 2816 tokens of keys and values fit into the free memory, fewer than 12 slots of 255"],
    )
    assert blocks(None, 64, 1) == (1 << 20) // (each // 4) < 64 * 4
    words = "a context of 255 tokens needs 1 MB for keys and values, 64 MB of memory are free"
    with pytest.raises(BadInput, match=words):
        blocks(each - 1, 3)
    assert blocks(each - 1, 3, allow=words.__eq__) == 4
    assert blocks(11 * each, 11, held=each) == 40
    with pytest.raises(BadInput, match=r"--kv-cache-mb is 1, 64 MB of memory are free\nGive less"):
        blocks(each, 64, 1)


def test_a_limit_below_one_context_is_refused(bundle_long: Path) -> None:
    model = Model.load(Bundle.open(bundle_long))
    with pytest.raises(BadInput, match=r"--kv-cache-mb is 1, a context of 8191 tokens needs \d+ MB\n"):
        allocate(model, 1, limit=1 << 20)
    other = Model.load(Bundle.open(bundle_long), "ort")
    said: list[str] = []
    assert allocate(other, 1, limit=1 << 20, say=said.append)[0].pool is None
    assert said == ["note: --kv-cache-mb has no effect: each slot has memory of its own with this engine or system"]


def test_answers_under_load_equal_those_of_an_idle_server(bundle_s8: Path, start: Starter, heldout: str) -> None:
    prompts = [heldout[begin : begin + length] for begin in (0, 40, 90) for length in (30, 130, 260)]
    bodies: list[dict[str, Any]] = [{"prompt": prompts[4], "max_tokens": 30, "temperature": 1.2, "seed": 3}]
    for index, prompt in enumerate(prompts):
        bodies.append({"prompt": prompt, "max_tokens": 20, "logprobs": 2, "echo": index % 3 == 0})
    quiet = start(bundle_s8, "--slots", 1).ready()
    alone, tokens = [], []
    for number, body in enumerate(bodies):
        quiet.complete("x" * (number + 1), max_tokens=1)  # another prefix, so that nothing can be reused
        answer = quiet.complete(**body)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        alone.append(answer["choices"])
        tokens.append(answer["usage"]["prompt_tokens"])
    longest = max((number for number in range(len(bodies)) if not bodies[number].get("echo")), key=tokens.__getitem__)
    busy = start(bundle_s8, "--slots", 3).ready()
    barrier = threading.Barrier(len(bodies))

    def ask(first: int) -> list[tuple[int, list[Any]]]:
        barrier.wait(300)
        numbers = [(first + number) % len(bodies) for number in range(len(bodies))]
        mixed = [(number, busy.complete(**bodies[number])["choices"]) for number in numbers]
        barrier.wait(300)
        return [*mixed, (longest, busy.complete(**bodies[longest])["choices"])]

    with ThreadPoolExecutor(len(bodies)) as pool:
        for answers in pool.map(ask, range(len(bodies))):
            for number, choices in answers:
                assert choices == alone[number]
    # Of the final identical requests, only the first on each slot can find no prefix to reuse.
    shared = tokens[longest] - 1
    assert busy.idle()['axrun_tokens_total{kind="prompt_reused"}'] >= (len(bodies) - 3) * shared > 100


def test_the_same_questions_have_the_same_answers_a_second_time(bundle_s8: Path, start: Starter, heldout: str) -> None:
    """The second time the prompt lies in the cache, in rows that were computed in other chunks, or as an answer."""
    server = start(bundle_s8, "--slots", 2).ready()
    bodies: list[dict[str, Any]] = [
        {"prompt": heldout[begin : begin + 7 * begin % 90 + 5], "max_tokens": 16, "temperature": 0, "logprobs": 3}
        for begin in range(20)
    ]
    first = [server.complete(**body) for body in bodies]
    cached = 0
    for body, one in zip(reversed(bodies), reversed(first), strict=True):
        again = server.complete(**body)
        assert again["choices"] == one["choices"]
        cached += again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0


@pytest.mark.parametrize("draft", [False, True])
def test_answers_in_mixed_company_equal_those_asked_alone(
    bundle_s8: Path, bundle_fp32: Path, start: Starter, heldout: str, draft: bool
) -> None:
    """Answers with a schema, with guesses, sampled and scored share runs with clients that hang up."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 8}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "required": ["a", "b"]}}}
    repeated = "the river runs by the old town. " * 6
    asked: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", {"messages": [{"role": "user", "content": "1+1="}], "response_format": form}),
        ("completions", {"prompt": repeated, "max_tokens": 40, "temperature": 0}),
        ("completions", {"prompt": repeated[5:], "max_tokens": 40, "temperature": 0.8, "seed": 4, "logprobs": 1}),
        ("completions", {"prompt": heldout[:200], "max_tokens": 12, "logprobs": 3, "echo": True}),
        ("completions", {"prompt": heldout[40:60], "max_tokens": 30, "temperature": 1.1, "seed": 9, "n": 2}),
    ]
    for _, body in asked[:1]:
        body.update(max_tokens=30, temperature=0.7, seed=1)
    quiet = start(bundle_s8, "--slots", 1, "--no-speculation").ready()
    alone = [quiet.post(path, **body).json()["choices"] for path, body in asked]
    busy = start(bundle_s8, "--slots", 5, *(["--draft", bundle_fp32] if draft else [])).ready()

    def hang_up() -> None:
        with busy.stream("completions", prompt=heldout[:300], max_tokens=100, temperature=1) as streamed:
            next(streamed.iter_lines())

    def ask(first: int) -> list[tuple[int, Any]]:
        found = []
        for number in range(first, first + len(asked)):
            if number % 2:
                hang_up()
            path, body = asked[number % len(asked)]
            found.append((number % len(asked), busy.post(path, **body).json()["choices"]))
        return found

    with ThreadPoolExecutor(6) as pool:
        for answers in pool.map(ask, range(6)):
            for number, choices in answers:
                assert choices == alone[number], asked[number]
    metrics = busy.idle()
    assert metrics["axrun_cancelled_total"] > 0
    assert metrics['axrun_tokens_total{kind="guessed"}'] > metrics['axrun_tokens_total{kind="accepted"}'] > 0
