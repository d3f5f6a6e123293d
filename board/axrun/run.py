"""axrun run: load a bundle, prefill the prompt, stream the answer, report the speed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axrun.decoder import expect_room
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.format.pooling import refuse_text
from axrun.generate import Stats, generate
from axrun.load import DEFAULTS, Loading, Say, describe, silent
from axrun.sampling import BREAKERS, Sampling
from axrun.sampling.checkpoint import sampling_of
from axrun.sequence import Sequence
from axrun.speculation import Speculation, draft
from axrun.text.stream import TextStream
from axrun.text.template import ChatTemplate, prompt_ids
from axrun.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from axrun.sampling.grammar import Grammar

ENDINGS = {"eos": "hit eos", "length": "max_tokens reached", "context": "context full"}


@dataclass(frozen=True)
class Answer:
    """Text and token ids of the answer, with statistics."""

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
            "guessed_tokens": self.stats.guessed,
            "accepted_tokens": self.stats.accepted,
            "stop": self.stats.stop,
        }


@dataclass(frozen=True)
class Options:
    """Options of an answer. Values in `sampling` that are not None override post_config.json.

    `generation_config`: use the sampling settings of the checkpoint's generation_config.json, not of post_config.json.
    `parse_special`: special tokens spelled in a message are control tokens, not text. `speculation`: guess tokens by
    prompt lookup, and with the draft model in the bundle `draft`. The answer is JSON that is valid under the schema in
    `json_schema`, or follows the grammar in `grammar`.
    """

    system: str | None = None
    max_tokens: int | None = None
    sampling: Mapping[str, float | None] = field(default_factory=dict)
    seed: int = 0
    parse_special: bool = False
    generation_config: bool = False
    speculation: bool = True
    draft: Path | None = None
    json_schema: Path | None = None
    grammar: Path | None = None

    def __post_init__(self) -> None:
        """Raises BadInput for a number out of range."""
        if self.max_tokens is not None and self.max_tokens < 1:
            raise BadInput(f"max_tokens is {self.max_tokens}, expected at least 1")
        if self.seed < 0:
            raise BadInput(f"seed is {self.seed}, expected at least 0")
        if self.draft and not self.speculation:
            raise BadInput("--draft and --no-speculation contradict each other: give one of them")

    def sampling_of(self, bundle: Bundle, say: Say) -> Sampling:
        """The sampling settings for a bundle. Reports settings of its checkpoint that are not applied.

        Raises BadInput for a value out of range, in the options or in the files.
        """
        sampling, remark = sampling_of(bundle, self.generation_config, **self.sampling)
        if sampling.dry_multiplier:
            sampling = sampling.override(dry_breakers=Tokenizer.open(bundle.hf).containing(BREAKERS))
        if remark:
            say(f"note: {remark}")
        return sampling

    def draft_for(self, bundle: Bundle, loading: Loading) -> Bundle | None:
        """The draft model, not loaded yet. Raises BadInput if it does not fit the bundle."""
        return None if self.draft is None else draft.open_for(bundle, self.draft, loading)

    def speculation_with(self, draft: Bundle | None, loading: Loading) -> Speculation | None:
        """What guesses tokens; loads the draft model. Raises BadInput if memory is too small."""
        return Speculation.load(draft, loading) if self.speculation else None

    def grammar_of(self, tokenizer: Tokenizer, vocab_size: int) -> Grammar | None:
        """The compiled schema or grammar. Raises BadInput if it is not valid or not supported."""
        if self.json_schema is None and self.grammar is None:
            return None
        from axrun.sampling.grammar import Compiler

        compiler = Compiler(tokenizer, vocab_size)
        if self.grammar is not None:
            return compiler.lark(read_text(self.grammar))
        assert self.json_schema is not None
        try:
            schema = json.loads(read_text(self.json_schema))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{self.json_schema} is not JSON: {error}") from None
        if not isinstance(schema, dict):
            raise BadInput(f"{self.json_schema} holds {schema!s:.40}, expected a JSON schema, which is an object")
        return compiler.schema(schema)


@dataclass(frozen=True)
class Question:
    """A prompt with its options; `raw`: without the chat template."""

    prompt: str
    raw: bool = False
    options: Options = field(default_factory=Options)


def run(path: Path, question: Question, loading: Loading = DEFAULTS, write: Say = silent) -> Answer:
    """Loads a bundle and answers a question. `write` receives the text as it is generated.

    Raises BadInput for an unusable bundle, prompt or option, CheckFailed if the bundle fails verification.
    """
    bundle, options, say = loading.open(path), question.options, loading.say
    refuse_text(bundle)
    sampling = options.sampling_of(bundle, say)
    say("LLM init start")
    tokenizer = Tokenizer.open(bundle.hf)
    template = None if question.raw else ChatTemplate.find(bundle.hf)
    ids = prompt_ids(tokenizer, template, question.prompt, options.system, options.parse_special)
    tokenizer.expect_within(ids, bundle.vocab_size)
    expect_room(len(ids), bundle.kv_cache_len)
    sampling = sampling.override(grammar=options.grammar_of(tokenizer, bundle.vocab_size))
    draft_bundle = options.draft_for(bundle, loading)
    model = loading.load(bundle)
    speculation = options.speculation_with(draft_bundle, loading)
    for line in describe(model, bundle):
        say(line)
    say(f"input token num : {len(ids)}, prefill_split_num : {len(list(model.decoder.chunks(0, len(ids))))}")
    return _answer(Sequence(model), tokenizer, ids, sampling, speculation, options, say, write)


def guesses(stats: Stats) -> str:
    """How many of the guessed tokens were right."""
    return f"speculation: {stats.accepted} of {stats.guessed} guessed tokens were right"


def _answer(
    sequence: Sequence,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: Sampling,
    speculation: Speculation | None,
    options: Options,
    say: Say,
    write: Say,
) -> Answer:
    stats, stream = Stats(), TextStream(tokenizer)
    answer: list[int] = []
    pieces: list[str] = []
    going = generate(
        sequence,
        ids,
        sampling,
        options.max_tokens,
        tokenizer.stop_ids,
        seed=options.seed,
        stats=stats,
        guesser=speculation.guesser(sequence) if speculation else None,
    )
    for token in going:
        if not answer:
            say(f"ttft: {1e3 * stats.ttft_seconds:.2f} ms")
        answer.append(token.id)
        pieces.append(stream.push(token.id))
        write(pieces[-1])
    pieces.append(stream.finish())
    write(pieces[-1] + "\n")
    say(f"{ENDINGS[stats.stop]},avg {stats.decode_rate:.2f} token/s")
    if stats.guessed:
        say(guesses(stats))
    return Answer("".join(pieces), tuple(answer), stats)


def read_text(path: Path) -> str:
    """The text of a file. Raises BadInput if it cannot be read."""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}") from None
