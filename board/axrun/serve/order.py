"""Turns a validated request body into choices to generate: prompt tokens, limits, sampling settings."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from axrun.embeddings import Texts
from axrun.errors import BadInput
from axrun.format.bundle import Bundle
from axrun.format.pooling import MEAN, Pooling
from axrun.sampling import BREAKERS, Sampling
from axrun.sampling.budget import Budget
from axrun.sampling.grammar import TOOLS, Compiler, Grammar
from axrun.serve.errors import invalid, sentence
from axrun.serve.field_kinds import MAX_CHOICES, MAX_LENGTH, NO_LIMIT
from axrun.serve.tools import Toolbox, Tools, read_calls
from axrun.text.template import ChatTemplate, chat_ids
from axrun.text.thinking import Thinking, marks_of, special_marks, thinking_after
from axrun.text.thinking_switch import STANDARD, Switch, switch_of
from axrun.text.tokenizer import Tokenizer

LEAST_TEMPERATURE = 1e-3  # below it sampling is effectively greedy, and the division could overflow
SAMPLING = (
    *("temperature", "top_p", "top_k", "repetition_penalty", "min_p", "presence_penalty", "frequency_penalty"),
    *("typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold"),
    *("dry_multiplier", "dry_base", "dry_allowed_length"),
)
BUDGET = "thinking_budget"
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")  # variables of the template that a request lacks


@dataclass(frozen=True)
class Choice:
    """One answer to generate. `text` is the prompt as the client sent it, None if it sent token ids.

    `stop_ids` are additional stop tokens. `max_tokens` None: up to the end of the context. `top`: number of most likely
    tokens to report with their log probabilities; None: no log probabilities. `shown`: special tokens that are part of
    the text.
    """

    index: int
    ids: Sequence[int]
    text: str | None
    sampling: Sampling
    seed: int | None
    max_tokens: int | None
    stop: Sequence[str]
    stop_ids: frozenset[int]
    top: int | None
    echo: bool
    ignore_eos: bool
    shown: frozenset[int] = frozenset()

    @property
    def scores_prompt(self) -> bool:
        """Whether logits of every prompt token are needed, so that cached K/V cannot be reused."""
        return self.echo and self.top is not None


@dataclass(frozen=True)
class Text:
    """A text to make an embedding of, as `texts` of its bundle says; `dimensions` None: all."""

    index: int
    ids: Sequence[int]
    texts: Texts
    dimensions: int | None

    @property
    def scores_prompt(self) -> bool:
        """Whether hidden states of every token are needed, so that cached K/V cannot be reused."""
        return self.texts.pooling.mode == MEAN


@dataclass(frozen=True)
class Order:
    """A parsed request: its choices, `n` for each prompt, or texts to embed, and the form of the response.

    `tools` may be called. `thinking`: the marks of thoughts that may be in an answer.
    """

    choices: Sequence[Choice | Text]
    n: int
    scored: bool
    stream: bool
    include_usage: bool
    tools: Tools | None = None
    thinking: Thinking | None = None


@dataclass(frozen=True)
class Reader:
    """Parses request bodies for one bundle.

    `parse_special`: special tokens spelled in a chat message are control tokens, not text.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    sampling: Sampling
    compiler: Compiler
    toolbox: Toolbox
    bundle: Bundle
    parse_special: bool = False
    thinking_budget: int | None = None

    @property
    def context(self) -> int:
        return self.bundle.kv_cache_len

    @property
    def vocab_size(self) -> int:
        return self.bundle.vocab_size

    @functools.cached_property
    def marks(self) -> tuple[str, str] | None:
        """The marks around thoughts in an answer to a chat, or None."""
        return None if self.template is None else marks_of(self.template)

    def chat(self, body: Mapping[str, Any]) -> Order:
        """Raises ApiError for a request that cannot be answered."""
        self.expect_text()
        if self.template is None:
            raise invalid("This model has no chat template; use /v1/completions.", "messages")
        if "top_logprobs" in body and not body.get("logprobs"):
            raise invalid("top_logprobs needs logprobs to be true.", "top_logprobs")
        tools = self.toolbox.tools_of(body)
        given = [_message(message, f"messages[{number}]") for number, message in enumerate(body["messages"])]
        asked, switched = self._switched(given, body)
        messages, variables = self.toolbox.prompt(asked, tools)
        variables.update(switched)
        try:
            ids = chat_ids(self.tokenizer, self.template, messages, self.parse_special, **variables)
        except BadInput as error:
            raise invalid(str(error), "messages") from None
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        top = body.get("top_logprobs", 0) if body.get("logprobs") else None
        thinking = self._thinking(ids)
        return self._order(body, [(None, ids)], "messages", limit, top, echo=False, tools=tools, thinking=thinking)

    @functools.cached_property
    def switch(self) -> Switch | None:
        """The switch for thinking that the chat template has, or None."""
        return None if self.template is None else switch_of(self.template)

    def _switched(self, messages: list[dict[str, Any]], body: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The messages and variables, with the wish to think or not under the name that the template reads."""
        variables, named = _variables(body), body.get("chat_template_kwargs", {})
        budget = body.get("thinking_budget", self.thinking_budget)
        if budget is not None and self.template is not None and BUDGET in self.template.variables:
            variables.setdefault(BUDGET, budget)
        on = variables.get(STANDARD)
        if not isinstance(on, bool) or self.switch is None or self.switch.variable in (STANDARD, *named):
            return messages, variables
        asked, more = self.switch.set(on, messages)
        return asked, {**more, **variables} if on else {**variables, **more}  # a given budget or effort is thinking

    def _thinking(self, ids: Sequence[int]) -> Thinking | None:
        if self.marks is None:
            return None
        return thinking_after(ids, self.marks, self.tokenizer)

    def _mark(self, text: str) -> int | None:
        """A mark as a token id; None if it is several tokens."""
        ids = self.tokenizer.encode(text, special=False)
        return ids[0] if len(ids) == 1 and ids[0] < self.vocab_size else None

    def _budget(self, body: Mapping[str, Any], thinking: Thinking | None) -> Budget | None:
        """The budget of tokens for thoughts. Raises ApiError if the request has one and it cannot be kept."""
        tokens = body.get("thinking_budget", self.thinking_budget)
        if tokens is None:
            return None
        begin, end = (self._mark(mark) for mark in self.marks) if self.marks else (None, None)
        if thinking is None or end is None or (begin is None and not thinking.open):
            if "thinking_budget" not in body:
                return None
            raise invalid("thinking_budget needs a model whose chat template has thoughts.", "thinking_budget")
        return Budget(tokens, None if thinking.open else begin, end)

    def completion(self, body: Mapping[str, Any]) -> Order:
        """Raises ApiError for a request that cannot be answered."""
        self.expect_text()
        given = body["prompt"]
        listed = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        prompts = [self._prompt(prompt) for prompt in listed]
        return self._order(
            body, prompts, "prompt", body.get("max_tokens"), body.get("logprobs"), echo=body.get("echo", False)
        )

    def _prompt(self, given: str | list[int]) -> tuple[str | None, list[int]]:
        if not isinstance(given, str):
            return None, given
        try:
            return given, self.tokenizer.encode(given)
        except BadInput as error:
            raise invalid(str(error), "prompt") from None

    def _order(
        self,
        body: Mapping[str, Any],
        prompts: Sequence[tuple[str | None, list[int]]],
        param: str,
        max_tokens: int | None,
        top: int | None,
        echo: bool,
        tools: Tools | None = None,
        thinking: Thinking | None = None,
    ) -> Order:
        for _, ids in prompts:
            if not ids:
                raise invalid("The prompt is empty; at least one token is needed.", param)
            if len(ids) > self.context:
                raise invalid(
                    f"The prompt has {len(ids)} tokens, and this model's context is {self.context}; shorten it.",
                    param,
                    "context_length_exceeded",
                )
            self.expect_within(ids, param)
        count = body.get("n", 1)
        if len(prompts) * count > MAX_CHOICES:
            raise invalid(f"{len(prompts)} prompts x n={count} is more than {MAX_CHOICES} answers.", "n")
        options, stop, seed = body.get("stream_options", {}), body.get("stop", []), body.get("seed")
        stop_ids = frozenset(body.get("stop_token_ids", []))
        self.expect_within(stop_ids, "stop_token_ids")
        if options and not body.get("stream"):
            raise invalid("stream_options needs stream to be true.", "stream_options")
        grammar, budget = self._grammar(body, tools), self._budget(body, thinking)
        if grammar is not None and thinking is not None and thinking.open:  # it holds for what follows the thoughts
            end = self._mark(thinking.end)
            thinking = thinking if end is not None else Thinking(thinking.begin, thinking.end)
            grammar = grammar if end is None else grammar.behind(end)
        sampling = self._sampling(body).override(grammar=grammar, budget=budget)
        if sampling.grammar is not None and body.get("ignore_eos"):
            raise invalid("ignore_eos cannot be combined with response_format and required tools.", "ignore_eos")
        shown = frozenset() if tools is None else self.toolbox.marks
        if thinking is not None:
            shown |= special_marks((thinking.begin, thinking.end), self.tokenizer).keys()
        choices = [
            Choice(
                index=number * count + i,
                ids=ids,
                text=text,
                sampling=sampling,
                seed=None if seed is None else (seed + i) % (1 << 64),
                max_tokens=None if max_tokens == NO_LIMIT else max_tokens,
                stop=[stop] if isinstance(stop, str) else stop,
                stop_ids=stop_ids,
                top=top,
                echo=echo,
                ignore_eos=body.get("ignore_eos", False),
                shown=shown,
            )
            for number, (text, ids) in enumerate(prompts)
            for i in range(count)
        ]
        stream, usage = body.get("stream", False), options.get("include_usage", False)
        return Order(choices, count, top is not None, stream, usage, tools, thinking)

    def _sampling(self, body: Mapping[str, Any]) -> Sampling:
        given = {key: body[key] for key in SAMPLING if key in body}
        if body.get("dry_multiplier"):
            given["dry_breakers"] = self.tokenizer.containing(tuple(body.get("dry_sequence_breakers", BREAKERS)))
            if body.get("dry_penalty_last_n", -1) >= 0:
                given["dry_window"] = body["dry_penalty_last_n"]
        if "repeat_penalty" in body:
            given.setdefault("repetition_penalty", body["repeat_penalty"])
        if "repeat_last_n" in body:
            given["penalty_window"] = MAX_LENGTH if body["repeat_last_n"] < 0 else body["repeat_last_n"]
        if given.get("temperature", 1) < LEAST_TEMPERATURE:
            given["temperature"] = 0.0
        if given.get("top_p") == 0:  # only the most likely token
            given.update(top_p=1.0, top_k=1)
        if body.get("logit_bias"):
            bias = given["logit_bias"] = {int(token): added for token, added in body["logit_bias"].items()}
            self.expect_within(bias, "logit_bias")
        return self.sampling.override(**given)

    def _grammar(self, body: Mapping[str, Any], tools: Tools | None) -> Grammar | None:
        """The grammar of `response_format` or required tools. Raises ApiError for a schema that cannot be enforced."""
        schema = _schema(body)
        try:
            if tools is not None and (tools.forced or schema is not None):
                text = tools.grammar(self.tokenizer, None if tools.forced else schema)
                return self.compiler.lark(text, TOOLS)
            return None if schema is None else self.compiler.schema(schema)
        except BadInput as error:
            param = "tools" if tools is not None else "response_format"
            raise invalid(sentence(error), param, "unsupported_schema") from None

    def expect_text(self) -> None:
        """Raises ApiError for a model that makes embeddings only."""
        if Pooling.of(self.bundle.manifest).only:
            raise invalid("This model makes embeddings only; use /v1/embeddings.", "model")

    def expect_within(self, ids: Iterable[int], param: str) -> None:
        """Raises ApiError for a token id outside the vocabulary."""
        try:
            self.tokenizer.expect_within(ids, self.vocab_size)
        except BadInput as error:
            raise invalid(sentence(error), param) from None


def _role(role: str) -> str:
    return "system" if role == "developer" else role


def _schema(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of `response_format`, None for text."""
    form: Mapping[str, Any] = body.get("response_format", {"type": "text"})
    if form["type"] == "text":
        return None
    if form["type"] == "json_object":
        found: Mapping[str, Any] = form.get("schema", {"type": "object"})
    elif "json_schema" in form:
        found = form["json_schema"]["schema"]
    else:
        raise invalid("response_format of type json_schema needs json_schema.", "response_format.json_schema")
    return found


def _variables(body: Mapping[str, Any]) -> dict[str, Any]:
    """Variables for the chat template. Raises ApiError for a name that is not one, or that the server sets."""
    found: dict[str, Any] = {}
    if "reasoning_effort" in body:
        found["reasoning_effort"] = body["reasoning_effort"]
        if body["reasoning_effort"] == "none":
            found[STANDARD] = False
    if STANDARD in body:
        found[STANDARD] = body[STANDARD]
    for name, value in body.get("chat_template_kwargs", {}).items():
        if not name.isidentifier() or name.startswith("_") or name in RESERVED:
            words = f"chat_template_kwargs names {name[:40]!a}, which is not a variable that a request may set."
            raise invalid(words, "chat_template_kwargs")
        found[name] = value
    return found


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message for the template. `content` is absent in assistant messages that only call tools."""
    made = {"role": _role(message["role"]), "content": message.get("content", "")}
    if thoughts := message.get("reasoning_content") or message.get("reasoning"):
        made["reasoning_content"] = thoughts
    if calls := list(read_calls(message, where)):
        made["tool_calls"] = calls
    return made if "tool_call_id" not in message else {**made, "tool_call_id": message["tool_call_id"]}
