"""A conversation that stays in the KV cache: each turn prefills only the tokens that are new.

The chat template is rendered for the whole conversation and tokenised; the prefix that is in the cache is reused. When
the context gets full, the system message is kept, and the oldest turns (question and answer) are dropped until the
prompt leaves the reserve for an answer.
"""

from __future__ import annotations

import functools
from collections import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from axrun.decoder import expect_room
from axrun.errors import BadInput
from axrun.generate import EOS, Stats, Token, steps
from axrun.model import Model
from axrun.sampling import Sampling
from axrun.sampling.sampler import Sampler
from axrun.sequence import Sequence
from axrun.speculation import Speculation
from axrun.text.stream import TextStream
from axrun.text.template import ChatTemplate, Messages, chat_ids
from axrun.text.thinking import ThinkStream, marks_of, special_marks, thinking_after
from axrun.text.thinking_switch import STANDARD, Switch, switch_of, thinks
from axrun.text.tokenizer import Tokenizer

Message = Mapping[str, str]
QUESTION: Message = {"role": "user", "content": "?"}


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
    """`messages` are the questions and answers so far, alternating, without the system message.

    What the model thinks is in `reasoning_content` of an answer, for the chat template.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        max_tokens: int | None = None,
        seed: int = 0,
        parse_special: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        """`max_tokens` None: answers may continue to the end of the context.

        `parse_special`: special tokens spelled in a message are control tokens, not text.
        `speculation`: guesses tokens.
        """
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._sampling, self._max_tokens, self._seed = sampling, max_tokens, seed
        self._parse_special = parse_special
        self._sequence = Sequence(model)
        self._speculation = speculation
        self._marks = marks_of(template)
        self._spelled = {} if self._marks is None else special_marks(self._marks, tokenizer)
        self._system: str | None = None
        self._thinks: bool | None = None  # None: as the template decides
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
            self._tokens([QUESTION])
        except Exception:
            self._system = before
            raise

    @property
    def thinking(self) -> bool | None:
        """Whether the chat template asks for thoughts; None if it has no switch for them."""
        if self._switch is None:
            return None
        return thinks(self._template, self._switch, self._asked([QUESTION])) if self._thinks is None else self._thinks

    @thinking.setter
    def thinking(self, on: bool) -> None:
        """Raises BadInput if the template has no switch, and keeps the old value if it refuses the new one."""
        if self._switch is None:
            raise BadInput(
                f"this model's chat template has no {STANDARD} or another known switch: its thinking cannot be switched"
            )
        before, self._thinks = self._thinks, on
        try:
            self._tokens([QUESTION])
        except Exception:
            self._thinks = before
            raise

    @functools.cached_property
    def _switch(self) -> Switch | None:
        return switch_of(self._template)

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

    def ask(
        self,
        question: str,
        between: Callable[[], None] = lambda: None,
        think: Callable[[str], None] = lambda thoughts: None,
    ) -> tuple[Turn, Iterator[str]]:
        """Asks a question; returns its Turn, updated as it proceeds, and an iterator over the text of the answer.

        `think` receives the thoughts before it as they are generated. `between` is called between tokens and may raise
        Stopped: the answer so far is kept. A question without a single token of answer is dropped. Raises BadInput if
        the question alone does not fit the context.
        """
        messages, prompt, forgotten = self._fit([*self.messages, {"role": "user", "content": question}])
        reused = self._sequence.reusable(prompt)
        turn = self.turn = Turn(reused, forgotten)
        return turn, self._answer(turn, messages, prompt, between, think)

    def _answer(
        self,
        turn: Turn,
        messages: list[Message],
        prompt: list[int],
        between: Callable[[], None],
        think: Callable[[str], None],
    ) -> Iterator[str]:
        stream, answered = TextStream(self._tokenizer), False
        parts = _Parts(self._think_stream(prompt), think)
        going = steps(
            self._sequence,
            prompt,
            Sampler(self._sampling, self._seed + len(messages)),
            self._max_tokens,
            self._tokenizer.stop_ids,
            reuse=turn.reused,
            stats=turn.stats,
            guesser=self._speculation.guesser(self._sequence) if self._speculation else None,
        )
        try:
            for step in going:
                if isinstance(step, Token) and step.stop != EOS:
                    answered = True
                    yield parts.push(stream.push(step.id) + self._spelled.get(step.id, ""))
                if not (isinstance(step, Token) and step.stop):
                    between()
        except Stopped:
            turn.stats.stop = "stopped"
        yield parts.push(stream.finish(), last=True)
        if answered:
            self.messages = [*messages, parts.message()]

    def _think_stream(self, prompt: abc.Sequence[int]) -> ThinkStream | None:
        return None if self._marks is None else thinking_after(prompt, self._marks, self._tokenizer).stream()

    def _fit(self, messages: list[Message]) -> tuple[list[Message], list[int], int]:
        """The messages to keep, their prompt, and the number of dropped turns."""
        forgotten = 0
        while len(prompt := self._tokens(messages)) + self.reserve > self.context and len(messages) > 1:
            messages, forgotten = messages[2:], forgotten + 1
        expect_room(len(prompt), self.context)
        return messages, prompt, forgotten

    def _tokens(self, messages: abc.Sequence[Message]) -> list[int]:
        asked = self._asked(messages)
        variables: dict[str, Any] = {}
        if self._switch is not None and self._thinks is not None:
            asked, variables = self._switch.set(self._thinks, asked)
        ids = chat_ids(self._tokenizer, self._template, asked, self._parse_special, **variables)
        self._tokenizer.expect_within(ids, self._model.post.vocab_size)
        return ids

    def _asked(self, messages: abc.Sequence[Message]) -> Messages:
        system: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *messages]


class _Parts:
    """The thoughts and the text of one answer."""

    def __init__(self, stream: ThinkStream | None, think: Callable[[str], None]) -> None:
        self._stream, self._think = stream, think
        self._thoughts, self._text = "", ""

    def push(self, text: str, last: bool = False) -> str:
        """Passes thoughts on; returns the text that is final."""
        if self._stream is not None:
            parts = [self._stream.push(text), *([self._stream.finish()] if last else [])]
            thoughts, text = ("".join(each) for each in zip(*parts))
            if thoughts:
                self._thoughts += thoughts
                self._think(thoughts)
        self._text += text
        return text

    def message(self) -> Message:
        thoughts = {"reasoning_content": self._thoughts} if self._thoughts else {}
        return {"role": "assistant", "content": self._text, **thoughts}
