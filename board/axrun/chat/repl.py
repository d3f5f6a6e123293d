"""axrun chat: reads lines, prints answers, and handles commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from axrun.chat.conversation import Conversation
from axrun.chat.terminal import Terminal
from axrun.errors import BadInput, Failure
from axrun.format.pooling import refuse_text
from axrun.load import DEFAULTS, Loading, Say, describe
from axrun.run import ENDINGS, Options, guesses
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer


def chat(path: Path, options: Options, terminal: Terminal, loading: Loading = DEFAULTS) -> None:
    """Loads a bundle and chats until the input ends. Questions and answers go through `terminal`, messages to `say`.

    Raises BadInput for an unusable bundle or option, and without a terminal also for an unusable question; CheckFailed
    if the bundle fails verification.
    """
    bundle, say = loading.open(path), loading.say
    refuse_text(bundle)
    sampling = options.sampling_of(bundle, say)
    tokenizer, template = Tokenizer.open(bundle.hf), ChatTemplate.find(bundle.hf)
    if template is None:
        raise BadInput(f"{bundle.hf} has no chat template, which chat needs; use axrun run instead")
    draft = options.draft_for(bundle, loading)
    say("LLM init start")
    model = loading.load(bundle)
    speculation = options.speculation_with(draft, loading)
    for line in describe(model, bundle):
        say(line)
    given = sampling, options.max_tokens, options.seed, options.parse_special, speculation
    conversation = Conversation(model, tokenizer, template, *given)
    conversation.system = options.system
    if terminal.interactive:
        say("Type a question. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    repl = Repl(conversation, terminal, say)
    for line in terminal.lines():
        if not repl.take(line):
            break


class Repl:
    """Handles input lines."""

    def __init__(self, conversation: Conversation, terminal: Terminal, say: Say) -> None:
        self.conversation, self.terminal, self.say = conversation, terminal, say

    def take(self, line: str) -> bool:
        """Runs a command or answers a question; returns False to quit."""
        text = line.strip()
        try:
            if text.startswith("/"):
                return self._command(*text.partition(" ")[::2])
            if text:
                self._answer(text)
        except Failure as failure:
            if not self.terminal.interactive:
                raise
            self.say(f"error: {failure}")
        return True

    def _command(self, name: str, rest: str) -> bool:
        if name not in COMMANDS:
            self.say(f"unknown command {name}; /help lists all commands")
            return True
        COMMANDS[name].action(self, rest.strip())
        return name != "/quit"

    def _answer(self, question: str) -> None:
        conversation = self.conversation
        turn, pieces = conversation.ask(question, self.terminal.between, self.terminal.think)
        if turn.forgotten:
            kept = "; the system message stays" if conversation.system is not None else ""
            self.say(f"[context full: dropped the oldest {_count(turn.forgotten, 'turn')}{kept}]")
        for piece in pieces:
            self.terminal.write(piece)
        self.terminal.write("\n")
        if turn.stats.stop in REMARKS:
            self.say(REMARKS[turn.stats.stop])

    def reset(self, rest: str) -> None:
        self.conversation.reset()
        self.say("[conversation cleared]")

    def undo(self, rest: str) -> None:
        question = self.conversation.undo()
        self.say("[nothing to undo]" if question is None else f"[removed: {question}]")

    def system(self, text: str) -> None:
        self.conversation.system = text or None
        self.say("[system message set]" if text else "[system message removed]")

    def think(self, text: str) -> None:
        conversation = self.conversation
        if text not in ("", *SWITCH):
            raise BadInput(f"/think {text}: expected on, off or nothing, which switches")
        conversation.thinking = SWITCH[text] if text else not conversation.thinking
        self.say("[thinking on]" if conversation.thinking else "[thinking off]")

    def stats(self, rest: str) -> None:
        conversation, turn = self.conversation, self.conversation.turn
        if turn is not None:
            stats = turn.stats
            self.say(f"input token num : {stats.prompt_tokens} new, {turn.reused} in the KV cache")
            self.say(f"ttft: {1e3 * stats.ttft_seconds:.2f} ms, {stats.prefill_rate:.2f} token/s")
            self.say(f"{ENDINGS.get(stats.stop, stats.stop)},avg {stats.decode_rate:.2f} token/s")
            if stats.guessed:
                self.say(guesses(stats))
        turns = _count(len(conversation.messages) // 2, "turn")
        self.say(f"KV cache: {conversation.length} of {conversation.context} tokens; {turns}")

    def quit(self, rest: str) -> None:
        pass

    def help(self, rest: str) -> None:
        for name, command in COMMANDS.items():
            self.say(f"{name + ' ' + command.argument:<14} {command.summary}")


@dataclass(frozen=True)
class Command:
    """A command that begins with a slash."""

    action: Callable[[Repl, str], None]
    argument: str
    summary: str


COMMANDS = {
    "/reset": Command(Repl.reset, "", "clear the conversation; keep the system message"),
    "/undo": Command(Repl.undo, "", "remove the last question and its answer"),
    "/system": Command(Repl.system, "TEXT", "set the system message; without TEXT, remove it"),
    "/think": Command(Repl.think, "on|off", "switch thinking, if the chat template can; without a word, to the other"),
    "/stats": Command(Repl.stats, "", "show statistics of the last turn, and use of the context"),
    "/help": Command(Repl.help, "", "list the commands"),
    "/quit": Command(Repl.quit, "", "quit, like Ctrl-D"),
}
SWITCH = {"on": True, "off": False}
REMARKS = {"context": "[context full: the answer ends here]", "stopped": "[stopped]"}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
