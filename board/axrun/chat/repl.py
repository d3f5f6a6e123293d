"""axrun chat: lines in, answers out, and commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from axrun.chat.conversation import Conversation
from axrun.chat.terminal import Terminal
from axrun.errors import BadInput, Failure
from axrun.load import DEFAULTS, Loading, Say, describe
from axrun.run import ENDINGS, Options
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer


def chat(path: Path, options: Options, terminal: Terminal, loading: Loading = DEFAULTS) -> None:
    """Loads a bundle and talks until the input ends. Questions and answers go through `terminal`, all else is said.

    Raises BadInput for a bundle or a value that cannot be used, and, where nobody is there to read them, for a question
    that cannot; CheckFailed when the bundle is not as built.
    """
    bundle, say = loading.open(path), loading.say
    sampling = options.sampling_of(bundle, say)
    tokenizer, template = Tokenizer.open(bundle.hf), ChatTemplate.find(bundle.hf)
    if template is None:
        raise BadInput(f"{bundle.hf} has no chat template, so there is no way to chat; ask without one: axrun run")
    say("LLM init start")
    model = loading.load(bundle)
    for line in describe(model, bundle):
        say(line)
    conversation = Conversation(
        model, tokenizer, template, sampling, options.max_tokens, options.seed, options.parse_special
    )
    conversation.system = options.system
    if terminal.interactive:
        say("Type a question. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
    repl = Repl(conversation, terminal, say)
    for line in terminal.lines():
        if not repl.take(line):
            break


class Repl:
    """What is done with a line."""

    def __init__(self, conversation: Conversation, terminal: Terminal, say: Say) -> None:
        self.conversation, self.terminal, self.say = conversation, terminal, say

    def take(self, line: str) -> bool:
        """Obeys a command or answers a question; False when it was the last."""
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
            self.say(f"there is no command {name}; /help lists them")
            return True
        COMMANDS[name].action(self, rest.strip())
        return name != "/quit"

    def _answer(self, question: str) -> None:
        conversation = self.conversation
        turn, pieces = conversation.ask(question, self.terminal.between)
        if turn.forgotten:
            kept = "; the system message stays" if conversation.system is not None else ""
            self.say(f"[context full: forgot the oldest {_count(turn.forgotten, 'turn')}{kept}]")
        for piece in pieces:
            self.terminal.write(piece)
        self.terminal.write("\n")
        if turn.stats.stop in REMARKS:
            self.say(REMARKS[turn.stats.stop])

    def reset(self, rest: str) -> None:
        self.conversation.reset()
        self.say("[all turns are forgotten]")

    def undo(self, rest: str) -> None:
        question = self.conversation.undo()
        self.say("[there is nothing to take back]" if question is None else f"[taken back: {question}]")

    def system(self, text: str) -> None:
        self.conversation.system = text or None
        self.say("[the system message is set]" if text else "[there is no system message]")

    def stats(self, rest: str) -> None:
        conversation, turn = self.conversation, self.conversation.turn
        if turn is not None:
            stats = turn.stats
            self.say(f"input token num : {stats.prompt_tokens} new, {turn.reused} in the K/V cache")
            self.say(f"ttft: {1e3 * stats.ttft_seconds:.2f} ms, {stats.prefill_rate:.2f} token/s")
            self.say(f"{ENDINGS.get(stats.stop, stats.stop)},avg {stats.decode_rate:.2f} token/s")
        turns = _count(len(conversation.messages) // 2, "turn")
        self.say(f"K/V cache: {conversation.length} of {conversation.context} tokens; {turns}")

    def quit(self, rest: str) -> None:
        pass

    def help(self, rest: str) -> None:
        for name, command in COMMANDS.items():
            self.say(f"{name + ' ' + command.argument:<14} {command.summary}")


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash."""

    action: Callable[[Repl, str], None]
    argument: str
    summary: str


COMMANDS = {
    "/reset": Command(Repl.reset, "", "forget all turns; the system message stays"),
    "/undo": Command(Repl.undo, "", "take back the last question and its answer"),
    "/system": Command(Repl.system, "TEXT", "set the system message; without TEXT there is none"),
    "/stats": Command(Repl.stats, "", "how the last turn went, and how full the context is"),
    "/help": Command(Repl.help, "", "this list"),
    "/quit": Command(Repl.quit, "", "end, as Ctrl-D does"),
}
REMARKS = {"context": "[context full: the answer ends here]", "stopped": "[stopped]"}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
