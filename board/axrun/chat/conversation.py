"""A conversation that stays in the KV cache: each turn prefills only the tokens that are new.

The chat template is rendered for the whole conversation and tokenised; the prefix that is in the cache is reused. When
the context gets full, the system message is kept, and the oldest turns (question and answer) are dropped until the
prompt leaves the reserve for an answer.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from axrun.decoder import expect_room
from axrun.generate import EOS, Stats, Token, steps
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence
from axrun.speculation import Costs, prompt_lookup
from axrun.text.stream import TextStream
from axrun.text.template import ChatTemplate, chat_ids
from axrun.text.tokenizer import Tokenizer

Message = Mapping[str, str]


class Stopped(Exception):
    """Raised by `between` to stop an answer."""


@dataclass
class Turn:
    """Statistics of a turn. `reused` tokens of its prompt were in the cache; `stats.prompt_tokens` were prefilled.

    `forgotten` is the number of turns dropped to make room. `stats.stop` may also be `stopped`.
    """

    reused: int
    forgotten: int
    stats: Stats = field(default_factory=Stats)


class Conversation:
    """`messages` are the questions and answers so far, alternating, without the system message."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        max_tokens: int | None = None,
        seed: int = 0,
        parse_special: bool = False,
        speculation: bool = True,
    ) -> None:
        """`max_tokens` None: answers may continue to the end of the context.

        `parse_special`: special tokens spelled in a message are control tokens, not text. `speculation`: guess tokens
        by prompt lookup.
        """
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._sampling, self._max_tokens, self._seed = sampling, max_tokens, seed
        self._parse_special = parse_special
        self._sequence = Sequence(model)
        self._costs = Costs() if speculation else None
        self._system: str | None = None
        self.messages: list[Message] = []
        self.turn: Turn | None = None

    @property
    def context(self) -> int:
        """Maximum number of tokens."""
        return self._sequence.context

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return self._sequence.length

    @property
    def reserve(self) -> int:
        """Tokens reserved for an answer: `max_tokens` or a quarter of the context, at most half of it."""
        wanted = self.context // 4 if self._max_tokens is None else self._max_tokens
        return min(wanted, self.context // 2)

    @property
    def system(self) -> str | None:
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        """Raises BadInput and keeps the old message if the template refuses a system message."""
        before, self._system = self._system, text
        try:
            self._tokens([{"role": "user", "content": "?"}])
        except Exception:
            self._system = before
            raise

    def reset(self) -> None:
        """Drops all turns; keeps the system message."""
        self.messages, self.turn = [], None

    def undo(self) -> str | None:
        """Drops the last question and its answer, and returns the question, or None."""
        if not self.messages:
            return None
        question = self.messages[-2]["content"]
        self.messages, self.turn = self.messages[:-2], None
        return question

    def ask(self, question: str, between: Callable[[], None] = lambda: None) -> tuple[Turn, Iterator[str]]:
        """Asks a question; returns its Turn, updated as it proceeds, and an iterator over the text of the answer.

        `between` is called between tokens and may raise Stopped: the answer so far is kept. A question without a single
        token of answer is dropped. Raises BadInput if the question alone does not fit the context.
        """
        messages, prompt, forgotten = self._fit([*self.messages, {"role": "user", "content": question}])
        reused = self._sequence.reusable(prompt)
        turn = self.turn = Turn(reused, forgotten)
        return turn, self._answer(turn, messages, prompt, between)

    def _answer(
        self, turn: Turn, messages: list[Message], prompt: list[int], between: Callable[[], None]
    ) -> Iterator[str]:
        stream, pieces = TextStream(self._tokenizer), []
        going = steps(
            self._sequence,
            prompt,
            Sampler(self._sampling, self._seed + len(messages)),
            self._max_tokens,
            self._tokenizer.stop_ids,
            reuse=turn.reused,
            stats=turn.stats,
            guesser=prompt_lookup(self._model, self._costs) if self._costs else None,
        )
        try:
            for step in going:
                if isinstance(step, Token) and step.stop != EOS:
                    pieces.append(stream.push(step.id))
                    yield pieces[-1]
                if not (isinstance(step, Token) and step.stop):
                    between()
        except Stopped:
            turn.stats.stop = "stopped"
        answered = bool(pieces)
        pieces.append(stream.finish())
        yield pieces[-1]
        if answered:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]

    def _fit(self, messages: list[Message]) -> tuple[list[Message], list[int], int]:
        """The messages to keep, their prompt, and the number of dropped turns."""
        forgotten = 0
        while len(prompt := self._tokens(messages)) + self.reserve > self.context and len(messages) > 1:
            messages, forgotten = messages[2:], forgotten + 1
        expect_room(len(prompt), self.context)
        return messages, prompt, forgotten

    def _tokens(self, messages: abc.Sequence[Message]) -> list[int]:
        system: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        ids = chat_ids(self._tokenizer, self._template, [*system, *messages], self._parse_special)
        self._tokenizer.expect_within(ids, self._model.post.vocab_size)
        return ids
