"""The switch for thinking is found in the chat template, whatever its name is there."""

from __future__ import annotations

from typing import Any

import pytest

from axrun.text.template import ChatTemplate
from axrun.text.thinking_switch import switch_of, thinks

PARTS = {
    "TURNS": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>",
    "EMPTY": "{{ '<think></think>' }}",
    "WORDS": "{% set ns = namespace(text='', mode='/think') %}{% for m in messages if m.role == 'system' %}"
    "{% if '/no_think' in m.content %}{% set ns.mode = '/no_think' %}{% endif %}"
    "{% set ns.text = m.content.replace('/no_think', '').replace('/think', '') | trim %}{% endfor %}"
    "Mode: {{ ns.mode }} {{ ns.text }}{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}"
    "{% endfor %}<assistant>{% if ns.mode == '/no_think' %}EMPTY{% endif %}",
}
BOOL, BUDGET, EFFORT = (True, False), (-1, 0), ("high", "none")
# (template, variable, values for on and off, whether it thinks if nothing is set)
TEMPLATES: dict[str, tuple[str, str, tuple[Any, Any], bool]] = {
    "on unless off": (
        "TURNS{% if enable_thinking is defined and enable_thinking is false %}EMPTY{% endif %}",
        *("enable_thinking", BOOL, True),
    ),
    "off unless on": (
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
        "TURNS{% if thinking %}<think>{% else %}</think>{% endif %}",
        *("thinking", BOOL, False),
    ),
    "before the turns": ("{% if thinking %}Think first.{% endif %}TURNS", "thinking", BOOL, False),
    "two names": (
        "{% if not thinking is defined %}{% set thinking = enable_thinking is defined and enable_thinking %}{% endif %}"
        "TURNS{% if thinking %}<think>{% endif %}",
        *("enable_thinking", BOOL, False),
    ),
    "a variable and words": (
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        "WORDS{% if not enable_thinking %}EMPTY{% endif %}",
        *("enable_thinking", BOOL, True),
    ),
    "a budget": (
        "{% if not thinking_budget is defined %}{% set thinking_budget = -1 %}{% endif %}{% if thinking_budget == 0 %}"
        "No thoughts.{% elif thinking_budget > 0 %}At most {{ thinking_budget }}.{% endif %}TURNS",
        *("thinking_budget", BUDGET, True),
    ),
    "an effort": (
        "TURNS{% if reasoning_effort is defined and reasoning_effort | lower == 'none' %}EMPTY{% endif %}",
        *("reasoning_effort", EFFORT, True),
    ),
    "another word for no effort": (
        "{% if reasoning_effort not in ['high', 'low', 'no_think'] %}{% set reasoning_effort = 'low' %}{% endif %}"
        "TURNS{% if reasoning_effort == 'no_think' %}EMPTY{% endif %}",
        *("reasoning_effort", ("high", "no_think"), True),
    ),
    "a mode": (
        "TURNS{% if thinking_mode == 'enabled' %}<think>{% elif thinking_mode == 'disabled' %}EMPTY{% endif %}",
        *("thinking_mode", ("enabled", "disabled"), True),
    ),
    "words": ("WORDS", "", ("/think", "/no_think"), True),
}


def template_of(source: str) -> ChatTemplate:
    for name in ("WORDS", "TURNS", "EMPTY"):
        source = source.replace(name, PARTS[name])
    return ChatTemplate(source, {})


@pytest.mark.parametrize(("source", "variable", "values", "default"), list(TEMPLATES.values()), ids=list(TEMPLATES))
def test_the_switch_of_a_template(source: str, variable: str, values: tuple[Any, Any], default: bool) -> None:
    template = template_of(source)
    switch = switch_of(template)
    assert switch is not None
    assert (switch.variable, (switch.on, switch.off)) == (variable, values)
    question = [{"role": "user", "content": "Hello"}]
    assert thinks(template, switch, question) is default
    prompts = []
    for on in (True, False):
        messages, variables = switch.set(on, question)
        prompts.append(template.render(messages, **variables))
    assert prompts[0] != prompts[1]
    assert all("Hello" in prompt for prompt in prompts)


@pytest.mark.parametrize(
    "source",
    [
        "TURNS",
        "Reasoning: {{ reasoning_effort or 'none' }}TURNS",  # it repeats any effort
        "TURNS{% if reasoning_effort == 'high' %}Think hard.{% endif %}",
        "{# enable_thinking, /no_think #}TURNS",
        "{% set thinking = true %}TURNS{% if thinking %}<think>{% endif %}",
        "{% for m in messages %}{{ m.thinking }}{{ m.content.replace('/no_think', '') }}{% endfor %}",
        "{{ raise_exception('never') }}{{ enable_thinking }}",
    ],
)
def test_templates_without_a_switch(source: str) -> None:
    assert switch_of(template_of(source)) is None


def test_a_word_joins_the_system_message() -> None:
    switch = switch_of(template_of("WORDS"))
    assert switch is not None
    ask = {"role": "user", "content": "Hello"}

    def system(content: Any) -> Any:
        return switch.set(False, [{"role": "system", "content": content}, ask])[0][0]["content"]

    assert switch.set(False, [ask])[0] == [{"role": "system", "content": "/no_think"}, ask]
    assert system("Be brief.") == system([{"type": "text", "text": "Be brief."}]) == "Be brief.\n/no_think"
    assert system("Be brief. /think") == "Be brief. /think"
