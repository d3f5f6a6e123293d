"""One answer, written step by step: every step is one run of the engine, so that many answers can take turns."""

from __future__ import annotations

import codecs
from collections import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

from numpy.typing import NDArray

from axrun.generate import EOS, Prefilled, steps
from axrun.model import Logits, Model
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence
from axrun.serve.logprobs import Rated, Scored, likeliest, log_softmax
from axrun.serve.order import Choice
from axrun.text.stop_strings import StopStrings
from axrun.text.stream import TextStream
from axrun.text.tokenizer import Tokenizer

Array = NDArray[Any]


class Piece(NamedTuple):
    """More of an answer: text that is final, and the tokens it came from where log probabilities are wanted.

    `finish` is stop or length with the last piece, empty before. Counts are of tokens, up to here; a stop token is none
    of the answer's. `reused` ones of the prompt were in the slot already.
    """

    choice: int
    text: str
    scored: abc.Sequence[Scored]
    finish: str
    prompt: int
    reused: int
    written: int


class Writer:
    """Writes answers with the tokenizer of one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def write(self, choice: Choice, sequence: Sequence) -> Iterator[Piece | None]:
        """After every run of the engine, the piece it gave, or None in the middle of a prompt.

        The last piece has a `finish`. Raises CheckFailed when the model gives no finite numbers.
        """
        reused = 0 if choice.scores_prompt else sequence.reusable(choice.ids)
        script = _Script(choice, reused, self._tokenizer)
        stop_ids = choice.stop_ids if choice.ignore_eos else choice.stop_ids | self._tokenizer.stop_ids
        sampler = Sampler(choice.sampling, choice.seed)
        for step in steps(sequence, choice.ids, sampler, choice.max_tokens, stop_ids, reuse=reused):
            if isinstance(step, Prefilled):
                if choice.scores_prompt:
                    following = choice.ids[step.done - len(step.hidden) + 1 : step.done + 1]
                    self._score(sequence.model, step.hidden[: len(following)], following, script)
                if step.done < len(choice.ids):
                    yield None
                continue
            script.add(step.id, step.logits, step.stop == EOS)
            if step.stop or script.ended:
                break
            yield script.piece()
        yield script.last()

    def _score(self, model: Model, hidden: Array, following: abc.Sequence[int], script: _Script) -> None:
        """Of tokens of the prompt, by the hidden states before them."""
        at = 0
        for rows in model.logits(hidden):
            script.prompt_scores(following[at : at + len(rows)], log_softmax(rows))
            at += len(rows)


class _Script:
    """The text and the scores of an answer, and how much of them may be shown."""

    def __init__(self, choice: Choice, reused: int, tokenizer: Tokenizer) -> None:
        self._choice, self._reused, self._tokenizer = choice, reused, tokenizer
        self._stream, self._stops = TextStream(tokenizer), StopStrings(choice.stop)
        self._waiting: list[Scored] = []  # scores whose text is not shown yet
        self._new = ""  # text to show with the next piece
        self._shown = 0  # characters, the next piece's too
        self._whole = 0  # characters up to the last whole one, shown or not
        self._decoder, self._placed = codecs.getincrementaldecoder("utf-8")("replace"), 0  # in the prompt
        self._ended = False
        self.written = 0
        if choice.echo:
            self._show(self._prompt())
            self._whole = self._shown
        if choice.scores_prompt:  # the first token has nothing before it to be rated by
            self._score(choice.ids[0], None, self._place(choice.ids[0]))

    @property
    def ended(self) -> bool:
        """A stop token or a stop string was met."""
        return self._ended or self._stops.found

    def add(self, token: int, logits: Logits, ends: bool) -> None:
        """A token of the answer, or where it `ends` the stop token behind it."""
        self._ended = ends
        if self._choice.top is not None:
            self._score(token, log_softmax(logits), self._whole, self._ended)
        if not self._ended:
            self.written += 1
            text = self._stream.push(token)
            self._whole += len(text)
            self._show(self._stops.push(text, self._hidden(token)))

    def _hidden(self, token: int) -> str:
        """The spelling of a special token, which is not shown."""
        return self._tokenizer.token_bytes(token).decode() if token in self._tokenizer.special_ids else ""

    def prompt_scores(self, ids: abc.Sequence[int], rows: Logits) -> None:
        """The next tokens of the prompt by their log probabilities, [n, vocab]."""
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
        """Where a token of the prompt begins; one inside a character, where that does."""
        start = self._placed
        self._placed += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        return start

    def piece(self, finish: str = "") -> Piece:
        """What came since the last one."""
        ready = len(self._waiting) if finish and not self._stops.found else self._begun()
        scored, self._waiting = self._waiting[:ready], self._waiting[ready:]
        text, self._new = self._new, ""
        return Piece(self._choice.index, text, scored, finish, len(self._choice.ids), self._reused, self.written)

    def last(self) -> Piece:
        """The rest."""
        if not self._stops.found:
            rest = self._stream.finish()
            self._show(self._stops.push(rest))
            self._show(self._stops.finish())
        return self.piece("stop" if self.ended else "length")

    def _begun(self) -> int:
        """Scores whose text is shown, at least in part."""
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
