"""The switch for thinking in a chat template: a variable, or a word in the system message.

Templates name it differently. A row of the table is the switch of a template if its two values give prompts that differ
in more than the values themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from axrun.errors import BadInput
from axrun.text.template import PROBE, ChatTemplate, Messages

STANDARD = "enable_thinking"  # the name that requests use for every template


@dataclass(frozen=True)
class Switch:
    """Values that turn thinking on and off. `variable` is that of the template; empty: words of the system message."""

    variable: str
    on: Any = True
    off: Any = False

    def set(self, on: bool, messages: Messages) -> tuple[Messages, dict[str, Any]]:
        """The messages and variables that ask for thoughts or not.

        A system message that has one of the words decides itself.
        """
        value = self.on if on else self.off
        if self.variable:
            return messages, {self.variable: value}
        first = messages[0] if messages else {}
        if first.get("role") != "system":
            return [{"role": "system", "content": value}, *messages], {}
        text = first.get("content", "")
        if not isinstance(text, str):
            text = "".join(str(part.get("text", "")) for part in text)
        if any(word in text for word in (self.on, self.off)):
            return messages, {}
        return [{**first, "content": f"{text}\n{value}" if text else value}, *messages[1:]], {}


# The order decides if a template has several.
SWITCHES = (
    Switch(STANDARD),  # Qwen3, GLM-4.5, SmolLM3, Hunyuan
    Switch("thinking"),  # DeepSeek-V3.1, Granite, Kimi-K2.5
    Switch("thinking_mode", "enabled", "disabled"),  # MiniMax
    Switch("thinking_budget", -1, 0),  # Seed-OSS
    Switch("reasoning_effort", "high", "none"),  # Cohere, Mistral
    Switch("reasoning_effort", "high", "no_think"),  # Hunyuan 3
    Switch("", "/think", "/no_think"),  # Nemotron
)


def switch_of(template: ChatTemplate) -> Switch | None:
    """The switch that a template has, or None."""
    return next((switch for switch in SWITCHES if _switches(switch, template)), None)


def thinks(template: ChatTemplate, switch: Switch, messages: Messages) -> bool:
    """Whether a template asks for thoughts if nothing is set."""
    usual = _prompt(switch, None, template, messages)
    return usual is not None and usual != _prompt(switch, False, template, messages)


def _switches(switch: Switch, template: ChatTemplate) -> bool:
    if switch.variable and switch.variable not in template.variables:
        return False
    if isinstance(switch.off, str) and switch.off not in template.literals:
        return False
    asked = [{"role": "system", "content": PROBE}, {"role": "user", "content": PROBE}]
    for messages in (asked[1:], asked):
        on, off = (_prompt(switch, value, template, messages) for value in (True, False))
        if None not in (on, off) and on != off:
            return True
    return False


def _prompt(switch: Switch, on: bool | None, template: ChatTemplate, messages: Messages) -> str | None:
    """The prompt without the values of the switch, which a template may only repeat; None if it refuses them."""
    try:
        turns, variables = (messages, {}) if on is None else switch.set(on, messages)
        prompt = template.render(template.fit(turns), **variables)
    except BadInput:
        return None
    return prompt.replace(str(switch.off), "").replace(str(switch.on), "")
