"""Ask a bundle one question: load it, give it the prompt, stream the answer, say how fast it went."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from board import bundle as bundles
from board.bundle import Bundle
from board.chat import ChatTemplate, prompt_ids
from board.decoder import chunks, expect_room
from board.errors import BadInput
from board.generate import Stats, generate
from board.memory import Allow, refuse, remaining, require
from board.model import Model
from board.sampling import Sampling
from board.tokenizer import TextStream, Tokenizer

Say = Callable[[str], None]

ENDINGS = {"eos": "hit eos", "length": "max_tokens reached", "context": "context full"}


@dataclass(frozen=True)
class Answer:
    """The answer's text and token ids, and how it went."""

    text: str
    ids: tuple[int, ...]
    stats: Stats

    def json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "tokens": list(self.ids),
            "prompt_tokens": self.stats.prompt_tokens,
            "ttft_ms": round(1e3 * self.stats.ttft_seconds, 3),
            "prefill_tokens_per_s": round(self.stats.prefill_rate, 3),
            "decode_tokens_per_s": round(self.stats.decode_rate, 3),
            "stop": self.stats.stop,
        }


@dataclass(frozen=True)
class Question:
    """`raw` leaves out the chat template; `greedy` and what is not None in `sampling` override post_config.json."""

    prompt: str
    system: str | None = None
    raw: bool = False
    max_tokens: int | None = None
    greedy: bool = False
    sampling: Mapping[str, float | None] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises BadInput for a number out of range."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadInput(f"max_tokens is {self.max_tokens}, expected at least 1")
        if self.seed < 0:
            raise BadInput(f"seed is {self.seed}, expected at least 0")


def run(
    path: Path,
    question: Question,
    *,
    verify: bool = False,
    engine: str = "ort",
    threads: int | None = None,
    allow: Allow = refuse,
    say: Say = lambda line: None,
    progress: Say = lambda line: None,
    write: Say = lambda text: None,
) -> Answer:
    """Loads a bundle and answers. `say` and `progress` get console lines, `write` the answer's text as it comes.

    `allow` is asked where memory is too small.

    Raises BadInput for a bundle, a prompt or a value that cannot be used, CheckFailed when the bundle is not as built.
    """
    if verify:
        bundles.verify(path)
    bundle = Bundle.open(path)
    sampling = Sampling.from_post_config(bundle.post_config).override(**question.sampling)
    if question.greedy:
        sampling = sampling.override(temperature=0.0)
    say("LLM init start")
    tokenizer = Tokenizer.find(bundle.hf)
    if tokenizer is None:
        raise BadInput(f"{bundle.hf} has no tokenizer, so there is no way to ask; build from a checkpoint that has one")
    template = None if question.raw else ChatTemplate.find(bundle.hf)
    ids = prompt_ids(tokenizer, template, question.prompt, question.system)
    expect_room(len(ids), bundle.kv_cache_len)
    model = load(bundle, engine, threads, progress, allow)
    for line in describe(model, bundle):
        say(line)
    say(f"input token num : {len(ids)}, prefill_split_num : {len(list(chunks(model.decoder.groups, 0, len(ids))))}")
    return _answer(model, tokenizer, ids, sampling, question, say, write)


def load(bundle: Bundle, engine: str, threads: int | None, progress: Say, allow: Allow = refuse) -> Model:
    """The model, with a line of progress for each part.

    Raises BadInput when memory is too small and `allow`, asked with the numbers, says no.
    """
    require(bundle, engine, allow)
    parts = iter(range(1, bundle.layers + 3))

    def loaded(what: str) -> None:
        progress(f"[{next(parts)}/{bundle.layers + 2}] {what},{remaining()}")

    return Model.load(bundle, engine, threads, loaded)


def describe(model: Model, bundle: Bundle) -> Iterator[str]:
    """What the vendor's runner says of a loaded model; there too, a group without history counts as one of 1 row."""
    prefill = [group for group in model.decoder.groups if group.tokens > 1]
    yield f"max_token_len : {model.context}"
    yield f"kv_cache_size : {model.decoder.kv_size}, kv_cache_num: {model.context}"
    if prefill:
        yield f"prefill_token_num : {prefill[0].tokens}"
        yield from (f"grp: {group.index}, prefill_max_kv_cache_num : {max(group.history, 1)}" for group in prefill)
        yield f"prefill_max_token_num : {max(group.history for group in prefill) or 1}"
    yield f"load config: {json.dumps(dict(bundle.post_config), sort_keys=True)}"
    yield "LLM init ok"


def _answer(
    model: Model, tokenizer: Tokenizer, ids: list[int], sampling: Sampling, question: Question, say: Say, write: Say
) -> Answer:
    stats, stream = Stats(), TextStream(tokenizer)
    answer: list[int] = []
    pieces: list[str] = []
    tokens = generate(model, ids, sampling, question.max_tokens, tokenizer.stop_ids, seed=question.seed, stats=stats)
    for token in tokens:
        if not answer:
            say(f"ttft: {1e3 * stats.ttft_seconds:.2f} ms")
        answer.append(token.id)
        pieces.append(stream.push(token.id))
        write(pieces[-1])
    pieces.append(stream.finish())
    write(pieces[-1] + "\n")
    say(f"{ENDINGS[stats.stop]},avg {stats.decode_rate:.2f} token/s")
    return Answer("".join(pieces), tuple(answer), stats)
