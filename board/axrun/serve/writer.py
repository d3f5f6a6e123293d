"""Generates one answer, job by job, so that the scheduler can run the jobs of many answers together."""

from __future__ import annotations

import codecs
from collections import abc
from collections.abc import Generator
from typing import Any, NamedTuple, Union

from numpy.typing import NDArray

from axrun.embeddings import ask as ask_embedding
from axrun.errors import CheckFailed
from axrun.generate import EOS, Prefilled, Stats, ask
from axrun.job import Computed, Job
from axrun.model import Logits, Model
from axrun.prompt_cache import PromptCache
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence
from axrun.serve.logprobs import Rated, Scored, likeliest, log_softmax
from axrun.serve.order import Choice, Text
from axrun.speculation import Speculation
from axrun.text.stop_strings import StopStrings
from axrun.text.stream import TextStream
from axrun.text.tokenizer import Tokenizer

Array = NDArray[Any]


class Piece(NamedTuple):
    """A part of an answer: final text, and its scored tokens if log probabilities were requested.

    `finish` is `stop` or `length` on the last piece and empty before. Token counts are cumulative; a stop token does
    not count as written. `reused` tokens of the prompt were already in the KV cache of the slot. Of `guessed` tokens,
    `accepted` were right. `at` is when it arrived, by time.monotonic(). `vector`: the embedding, of a text to embed.
    """

    choice: int
    text: str
    scored: abc.Sequence[Scored]
    finish: str
    prompt: int
    reused: int
    written: int
    guessed: int = 0
    accepted: int = 0
    at: float = 0.0
    vector: Any = None


Writing = Generator[Union[Job, Piece], Computed, None]


class Writer:
    """Generates answers with the tokenizer of one model."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_cache: PromptCache | None = None, speculation: Speculation | None = None
    ) -> None:
        """`speculation`: guesses tokens."""
        self._tokenizer, self._prompt_cache, self._speculation = tokenizer, prompt_cache, speculation

    def write(self, task: Choice | Text, sequence: Sequence) -> Writing:
        """Yields jobs, whose results have to be sent or whose CheckFailed thrown, and the pieces of the answer.

        The last piece has `finish` set. Raises CheckFailed if the model returns values that are not finite.
        """
        return self._embed(task, sequence) if isinstance(task, Text) else self._answer(task, sequence)

    def _embed(self, text: Text, sequence: Sequence) -> Writing:
        reused = 0 if text.scores_prompt else sequence.reusable(text.ids)
        going = ask_embedding(sequence, text.ids, text.texts.pooling.mode)
        step = next(going)
        while isinstance(step, Job):
            step = going.send((yield step))
        vector = text.texts.finish(step, text.dimensions)
        yield Piece(text.index, "", (), "stop", len(text.ids), reused, 0, vector=vector)

    def _answer(self, choice: Choice, sequence: Sequence) -> Writing:
        cache = None if choice.scores_prompt else self._prompt_cache
        if cache:
            cache.restore(sequence, choice.ids)
        reused = 0 if choice.scores_prompt else sequence.reusable(choice.ids)
        script = _Script(choice, reused, self._tokenizer)
        stop_ids = choice.stop_ids if choice.ignore_eos else choice.stop_ids | self._tokenizer.stop_ids
        sampler = Sampler(choice.sampling, choice.seed)
        going = ask(
            sequence,
            choice.ids,
            sampler,
            choice.max_tokens,
            stop_ids,
            reuse=reused,
            stats=script.stats,
            guesser=self._speculation.guesser(sequence) if self._speculation else None,
        )
        step = next(going, None)
        while step is not None:
            if isinstance(step, Job):
                try:
                    computed = yield step
                except CheckFailed as error:
                    step = going.throw(error)
                else:
                    step = going.send(computed)
                continue
            if isinstance(step, Prefilled):
                if choice.scores_prompt:
                    following = choice.ids[step.done - len(step.hidden) + 1 : step.done + 1]
                    self._score(sequence.model, step.hidden[: len(following)], following, script)
                step = next(going, None)
                continue
            if cache and not script.written:  # behind the first token, which need not wait for it
                cache.save(sequence, len(choice.ids))
            script.add(step.id, step.logits, step.stop == EOS)
            if step.stop or script.ended:
                break
            yield script.piece()
            step = next(going, None)
        yield script.last()

    def _score(self, model: Model, hidden: Array, following: abc.Sequence[int], script: _Script) -> None:
        """Scores tokens of the prompt with the logits of the hidden states before them."""
        at = 0
        for rows in model.logits(hidden):
            script.prompt_scores(following[at : at + len(rows)], log_softmax(rows))
            at += len(rows)


class _Script:
    """Accumulates text and scores of an answer, and tracks how much of them is final."""

    def __init__(self, choice: Choice, reused: int, tokenizer: Tokenizer) -> None:
        self._choice, self._reused, self._tokenizer = choice, reused, tokenizer
        self._stream, self._stops = TextStream(tokenizer), StopStrings(choice.stop)
        self._waiting: list[Scored] = []  # scores whose text is not final yet
        self._new = ""  # final text for the next piece
        self._shown = 0  # final characters, including the next piece
        self._whole = 0  # decoded characters, final or not
        self._decoder, self._placed = codecs.getincrementaldecoder("utf-8")("replace"), 0  # in the prompt
        self._ended = False
        self.written = 0
        self.stats = Stats()
        if choice.echo:
            self._show(self._prompt())
            self._whole = self._shown
        if choice.scores_prompt:  # the first token has no preceding logits
            self._score(choice.ids[0], None, self._place(choice.ids[0]))

    @property
    def ended(self) -> bool:
        """Whether a stop token or a stop string was found."""
        return self._ended or self._stops.found

    def add(self, token: int, logits: Logits, ends: bool) -> None:
        """Adds a token of the answer; with `ends`, the stop token after it."""
        self._ended = ends
        if self._choice.top is not None:
            self._score(token, log_softmax(logits), self._whole, self._ended)
        if not self._ended:
            self.written += 1
            text, hidden = self._stream.push(token), self._hidden(token)
            if token in self._choice.shown:
                text, hidden = text + hidden, ""
            self._whole += len(text)
            self._show(self._stops.push(text, hidden))

    def _hidden(self, token: int) -> str:
        """The spelling of a special token, which is matched against stop strings but not shown."""
        return self._tokenizer.token_bytes(token).decode() if token in self._tokenizer.special_ids else ""

    def prompt_scores(self, ids: abc.Sequence[int], rows: Logits) -> None:
        """Adds the scores of the next prompt tokens; `rows` are log probabilities [n, vocab]."""
        for token, row in zip(ids, rows):
            self._score(token, row, self._place(token))

    def _score(self, token: int, logprobs: Logits | None, start: int, ends: bool = False) -> None:
        if logprobs is None:
            scored = Scored(token, self._tokenizer.token_bytes(token), None, (), start)
        else:
            top = tuple(self._rated(other, logprobs) for other in likeliest(logprobs, self._choice.top or 0))
            scored = Scored(*self._rated(token, logprobs), top, start, ends)
        self._waiting.append(scored)

    def _place(self, token: int) -> int:
        """The character offset of a prompt token; a token inside a character gets the offset of that character."""
        start = self._placed
        self._placed += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return start

    def piece(self, finish: str = "") -> Piece:
        """The piece of everything final since the last call."""
        ready = len(self._waiting) if finish and not self._stops.found else self._begun()
        scored, self._waiting = self._waiting[:ready], self._waiting[ready:]
        text, self._new = self._new, ""
        guessed, accepted = self.stats.guessed, self.stats.accepted
        prompt = len(self._choice.ids)
        return Piece(self._choice.index, text, scored, finish, prompt, self._reused, self.written, guessed, accepted)

    def last(self) -> Piece:
        """The last piece."""
        if not self._stops.found:
            rest = self._stream.finish()
            self._show(self._stops.push(rest))
            self._show(self._stops.finish())
        return self.piece("stop" if self.ended else "length")

    def _begun(self) -> int:
        """The number of waiting scores whose text is final, at least in part."""
        return next((i for i, scored in enumerate(self._waiting) if scored.start >= self._shown), len(self._waiting))

    def _show(self, text: str) -> None:
        self._new += text
        self._shown += len(text)

    def _rated(self, token: int, logprobs: Logits) -> Rated:
        return Rated(token, self._tokenizer.token_bytes(token), float(logprobs[token]))

    def _prompt(self) -> str:
        if self._choice.text is not None:
            return self._choice.text
        return b"".join(map(self._tokenizer.token_bytes, self._choice.ids)).decode("utf-8", "replace")
