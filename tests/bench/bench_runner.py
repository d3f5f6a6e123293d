"""The runner's speed in pytest-benchmark: seconds are of one token or one first token, tok/s is in extra_info.

`make bench ARGS='-k runner'`. Random weights in the shapes of Qwen2-0.5B, s8, context 1023, prefill 128; about 2 GB of
disk. A conversation's second turn is measured on the shipped model, which answers in words.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from axrun.chat.conversation import Conversation
from axrun.decoder import Decoder
from axrun.format.bundle import Bundle
from axrun.generate import Stats, Token, generate
from axrun.model import Model, Post
from axrun.sampling import Sampling
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence
from axrun.session import Array, Binding, Session, SessionGroup, StackedBinding
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer
from tests.bench.tables import record
from tests.conftest import Builder

ROUNDS, TOKENS = 7, 32
SAMPLINGS = {
    "greedy": Sampling(),
    "temperature": Sampling(1.0),
    "top_k": Sampling(1.0, top_k=50),
    "top_p": Sampling(1.0, top_p=0.95),
    "all": Sampling(0.7, 1.1, None, 0.95, 100),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("runner")
    axc = [sys.executable, "-m", "axc"]
    subprocess.run([*axc, "synth", "--model", "qwen2-0.5b", "--output_path", folder / "checkpoint"], check=True)
    flags = ["--prefill_len", "128", "--kv_cache_len", "1023"]
    flags += [word for length in (128, 512, 1023) for word in ("--last_kv_cache_len", str(length))]
    places = ["--input_path", str(folder / "checkpoint"), "--output_path", str(folder / "bundle")]
    subprocess.run([*axc, "llm_build", *places, *flags, "--parallel", "2", "--check_level", "-1"], check=True)
    return Bundle.open(folder / "bundle")


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> Model:
    return Model.load(bundle)


def ids(model: Model, count: int) -> list[int]:
    return [(7919 * position + 1) % model.post.vocab_size for position in range(count)]


def first_token(sequence: Sequence, depth: int, tokens: int) -> None:
    """`tokens` new tokens after `depth` cached ones, up to the first token of the answer."""
    next(generate(sequence, ids(sequence.model, depth + tokens), Sampling()))


def cached(model: Model, depth: int) -> tuple[Sequence, Callable[[], None]]:
    """A sequence, and a function that truncates it to `depth` tokens before each round."""
    sequence = Sequence(model)
    for _ in sequence.extend(ids(model, depth)) if depth else ():
        pass
    return sequence, lambda: sequence.truncate(depth)


def decode(sequence: Sequence, depth: int, sampling: Sampling) -> Stats:
    stats = Stats()
    for _ in generate(sequence, ids(sequence.model, depth + 1), sampling, TOKENS, seed=0, stats=stats):
        pass
    return stats


def show(benchmark: BenchmarkFixture, tokens: int) -> None:
    """Adds tok/s to extra_info and prints it; the recorded time is for `tokens`."""
    assert benchmark.stats
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["tokens_per_second"] = tokens / seconds
    record(
        benchmark,
        "runner",
        "Runner: Qwen2-0.5B's shapes, s8",
        ("", "ms", "token/s"),
        [(benchmark.name.removeprefix("test_runner_"), f"{1e3 * seconds:.2f}", f"{tokens / seconds:.1f}")],
    )


@pytest.mark.parametrize("length", [23, 128, 512])
def test_runner_time_to_first_token(length: int, model: Model, benchmark: BenchmarkFixture) -> None:
    sequence, put_back = cached(model, 0)
    benchmark.pedantic(first_token, (sequence, 0, length), setup=put_back, rounds=ROUNDS, warmup_rounds=1)
    show(benchmark, length)


@pytest.mark.parametrize("depth", [64, 256, 900])
@pytest.mark.parametrize("turn", [4, 16, 64])
def test_runner_second_turn(turn: int, depth: int, model: Model, benchmark: BenchmarkFixture) -> None:
    """New tokens after a history; for comparison, all tokens of the turn without the cache."""
    sequence, put_back = cached(model, depth)
    benchmark.pedantic(first_token, (sequence, depth, turn), setup=put_back, rounds=ROUNDS, warmup_rounds=1)
    show(benchmark, turn)
    sequence.truncate(0)
    started = time.perf_counter()
    first_token(sequence, 0, depth + turn)
    without = benchmark.extra_info["seconds_without_cache"] = time.perf_counter() - started
    print(f"without the cache: {1e3 * without:.2f} ms")


@pytest.mark.parametrize("depth", [0, 128, 512, 900])
def test_runner_decode(depth: int, model: Model, benchmark: BenchmarkFixture) -> None:
    """An iteration is one token, a round is TOKENS of them after `depth`."""
    sequence, put_back = cached(model, depth)

    def tokens() -> Iterator[Token]:
        while True:
            put_back()
            yield from generate(sequence, ids(model, depth + 1), Sampling(), TOKENS)

    benchmark.pedantic(next, (tokens(),), rounds=ROUNDS, iterations=TOKENS, warmup_rounds=1)
    show(benchmark, 1)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_runner_sampling(sampling: str, spread: float, benchmark: BenchmarkFixture) -> None:
    """Samples from Qwen2's vocabulary after 900 tokens; logits are normal with the given deviation."""
    random = np.random.default_rng(0)
    logits = (spread * random.standard_normal(151_936)).astype(np.float32)
    benchmark.pedantic(
        Sampler(SAMPLINGS[sampling], 0), (logits, random.integers(0, 151_936, 900).tolist()), rounds=50, warmup_rounds=5
    )
    show(benchmark, 1)


class Clock:
    """Seconds spent in an engine."""

    def __init__(self) -> None:
        self.seconds = 0.0


class TimedBinding:
    """Times the runs of a binding."""

    def __init__(self, binding: Binding, clock: Clock) -> None:
        self._binding, self._clock = binding, clock

    def run(self) -> None:
        started = time.perf_counter()
        self._binding.run()
        self._clock.seconds += time.perf_counter() - started


class TimedSession:
    """A session with timed bindings; the remaining time is the runner's."""

    def __init__(self, session: Session, clock: Clock) -> None:
        self._session, self._clock = session, clock

    @property
    def flexible(self) -> bool:
        return self._session.flexible

    @property
    def exact(self) -> bool:
        return self._session.exact

    @property
    def stacks(self) -> bool:
        return False  # their runs are not timed

    @property
    def window(self) -> int:
        return self._session.window

    @property
    def groups(self) -> tuple[SessionGroup, ...]:
        return self._session.groups

    def allocate(self, info: Any) -> Array:
        return self._session.allocate(info)

    def bind(self, group: int, arrays: Mapping[str, Array]) -> TimedBinding:
        return TimedBinding(self._session.bind(group, arrays), self._clock)

    def bind_stacked(self, arrays: Mapping[str, Array]) -> StackedBinding:
        return self._session.bind_stacked(arrays)


@pytest.mark.parametrize("depth", [16, 900])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_runner_overhead_outside_the_engine(
    sampling: str, depth: int, model: Model, benchmark: BenchmarkFixture
) -> None:
    """Random weights give flat logits, the worst case for top_p."""
    clock = Clock()
    timed = Model(
        model.embedding,
        Decoder([TimedSession(session, clock) for session in model.decoder.sessions]),
        Post(TimedSession(model.post.session, clock)),
    )
    (sequence, put_back), shares = cached(timed, depth), []

    def run() -> None:
        clock.seconds = 0.0
        stats = decode(sequence, depth, SAMPLINGS[sampling])
        spent = stats.ttft_seconds + stats.decode_seconds
        shares.append((spent - clock.seconds) / spent)

    benchmark.pedantic(run, setup=put_back, rounds=ROUNDS, warmup_rounds=1)
    share = sorted(shares[1:])[ROUNDS // 2]
    benchmark.extra_info["share_outside_the_engine"] = share
    print(f"\n{sampling}, outside the engine at {depth}: {share:.2%} of decode time")


def test_runner_chat_second_turn_beside_a_first_of_all(build_tiny: Builder, benchmark: BenchmarkFixture) -> None:
    """The shipped model: a question at the end of a long conversation, with and without the cached conversation."""
    opened = Bundle.open(build_tiny(kv_cache_len=1000, prefill_len=64, last_kv_cache_len=(64, 256, 512, 900)))
    tokenizer, template = Tokenizer.find(opened.hf), ChatTemplate.find(opened.hf)
    assert tokenizer
    assert template
    model = Model.load(opened)
    conversation = Conversation(model, tokenizer, template)
    while conversation.length < 600:
        list(conversation.ask("tell me a story")[1])
    turns: list[tuple[int, float]] = []

    def ask() -> None:
        turn, pieces = conversation.ask("1+1=")
        list(pieces)
        turns.append((turn.stats.prompt_tokens, turn.stats.ttft_seconds))
        conversation.undo()
        list(conversation.ask("2+2=")[1])  # so that the next turn is not in the cache already
        conversation.undo()

    benchmark.pedantic(ask, rounds=ROUNDS, warmup_rounds=1)
    fresh = Conversation(model, tokenizer, template)
    fresh.messages = list(conversation.messages)
    whole, pieces = fresh.ask("1+1=")
    list(pieces)
    second = sorted(seconds for _, seconds in turns[1:])[ROUNDS // 2]
    benchmark.extra_info.update(
        new_tokens=turns[-1][0],
        ttft_seconds=second,
        all_tokens=whole.stats.prompt_tokens,
        all_ttft_seconds=whole.stats.ttft_seconds,
    )
    record(
        benchmark,
        "chat-second-turn",
        "Chat: a later turn reads only what is new, tiny-qwen2",
        ("", "tokens read", "ttft ms"),
        [
            ("next turn", str(turns[-1][0]), f"{1e3 * second:.2f}"),
            ("the same from nothing", str(whole.stats.prompt_tokens), f"{1e3 * whole.stats.ttft_seconds:.2f}"),
        ],
        unit="ms",
        bars=("ttft ms",),
    )
    assert turns[-1][0] < 30 < 500 < whole.stats.prompt_tokens
