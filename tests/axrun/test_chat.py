"""Chat templates compared with transformers' apply_chat_template, in the styles of several families."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

from axrun.errors import BadInput
from axrun.text.template import ChatTemplate, prompt_ids
from axrun.text.tokenizer import Tokenizer

CHATML = """{% for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nYou are terse.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

LLAMA3 = """{{ bos_token }}
{%- set date = strftime_now('%Y') if date is not defined else date %}
{%- for message in messages %}
    {%- set head = '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' %}
    {{- head + message['content'] | trim + '<|eot_id|>' }}
    {%- if tools is not none and loop.first %}{{ tools | tojson(indent=2) }}{% endif %}
{%- endfor %}
{{- date }}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set ns = namespace(system=messages[0]['content']) %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set ns = namespace(system='') %}{%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and ns.system %}{{ '[INST] ' + ns.system + '\n\n' + message['content'] + '[/INST]' }}
        {%- else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

MARKED = """{% for message in messages %}
{% if message.role == 'skip' %}{% continue %}{% endif %}
{% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% else %}
{{ message | tojson }}
{% endif %}
{% endfor %}"""

ASK: list[dict[str, str]] = [{"role": "user", "content": ' What is <1> & "2"? '}]
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Grüße, 漢字"},
    {"role": "assistant", "content": "Hello\n"},
    *ASK,
]


@pytest.fixture
def folder(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """tiny-qwen2's tokenizer without its template, with the special tokens that the templates use."""
    shutil.copy(tiny_qwen2 / "tokenizer.json", tmp_path)
    config = json.loads((tiny_qwen2 / "tokenizer_config.json").read_text())
    del config["chat_template"]
    config["bos_token"] = {"content": "<|endoftext|>", "__type": "AddedToken"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def configure(folder: Path, **values: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def both(folder: Path, messages: list[dict[str, str]], **variables: Any) -> tuple[str, str]:
    """Our prompt and that of transformers."""
    template = ChatTemplate.find(folder)
    assert template is not None
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **variables})
    return template.render(messages, **variables), expected


@pytest.mark.parametrize("messages", [ASK, TALK])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, MARKED])
@pytest.mark.parametrize("prompt", [True, False])
def test_prompts_match_transformers(folder: Path, template: str, messages: list[dict[str, str]], prompt: bool) -> None:
    configure(folder, chat_template=template)
    ours, theirs = both(folder, messages, add_generation_prompt=prompt)
    assert ours == theirs
    assert messages[-1]["content"].strip() in ours or template == MARKED


@pytest.mark.parametrize("messages", [ASK, TALK])
def test_prompts_of_the_shipped_model_match_transformers(tiny_qwen2: Path, messages: list[dict[str, str]]) -> None:
    ours, theirs = both(tiny_qwen2, messages)
    assert ours == theirs


def test_variables_reach_the_template(folder: Path) -> None:
    configure(folder, chat_template=LLAMA3)
    ours, theirs = both(folder, ASK, date="1 May", tools=[{"type": "function", "function": {"name": "sümme"}}])
    assert ours == theirs
    assert "1 May" in ours
    assert "sümme" in ours


def test_the_default_of_several_templates_is_used(folder: Path) -> None:
    configure(folder, chat_template=[{"name": "rag", "template": "no"}, {"name": "default", "template": CHATML}])
    ours, theirs = both(folder, TALK)
    assert ours == theirs
    assert "Be kind." in ours


def test_a_template_file_comes_first(folder: Path) -> None:
    configure(folder, chat_template="not this")
    (folder / "chat_template.jinja").write_text(CHATML)
    ours, theirs = both(folder, TALK)
    assert ours == theirs
    assert "Be kind." in ours


def test_a_template_in_a_json_file_is_found(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    template = ChatTemplate.find(folder)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "hi!"


def test_a_folder_without_a_template_has_none(folder: Path) -> None:
    assert ChatTemplate.find(folder) is None


def test_a_refusal_has_the_message_of_the_template() -> None:
    template = ChatTemplate(MISTRAL, {"bos_token": "<s>", "eos_token": "</s>"})
    with pytest.raises(BadInput, match="refuses these messages: After the optional system message"):
        template.render([{"role": "assistant", "content": "me first"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['datetime'] }}",
        "{% for i in range(1000000) %}x{% endfor %}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(BadInput, match="the chat template refuses"):
        ChatTemplate(source, {}).render(ASK)


def test_a_damaged_template_is_reported() -> None:
    with pytest.raises(BadInput, match=r"the chat template is damaged.*\n.*--raw"):
        ChatTemplate("{% for %}", {})


def test_a_question_becomes_ids_with_the_special_tokens_once(tiny_qwen2: Path, hf_tokenizer: Any) -> None:
    tokenizer = Tokenizer.find(tiny_qwen2)
    assert tokenizer is not None
    template = ChatTemplate.find(tiny_qwen2)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1="}]
    expected = hf_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt_ids(tokenizer, template, "1+1=", "Be kind.") == list(expected)
    assert prompt_ids(tokenizer, None, "1+1=") == hf_tokenizer("1+1=")["input_ids"]
    with pytest.raises(BadInput, match="a system message needs a chat template"):
        prompt_ids(tokenizer, None, "1+1=", "Be kind.")


PARTED = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}!{% endif %}{% endfor %}"
)
MIXED = "{% for m in messages %}{{ m.content | upper if m.role == 'system' else m.content[0].text }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "forms", "prompt"),
    [
        (PARTED, {"user": "parts", "system": "parts", "assistant": "parts"}, "[system]Be kind.[user]ab"),
        (EITHER, {"user": "string", "system": "string", "assistant": "string"}, "Be kind.ab"),
        (MIXED, {"user": "parts", "system": "string", "assistant": "parts"}, "BE KIND.ab"),
    ],
)
@pytest.mark.parametrize("typed", [False, True])
def test_content_has_the_form_that_the_template_reads(
    source: str, forms: dict[str, str], prompt: str, typed: bool
) -> None:
    template = ChatTemplate(source, {})
    assert template.forms == forms
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}] if typed else "ab"
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]
    assert template.render(template.fit(messages)) == prompt


def test_a_template_may_require_a_system_message() -> None:
    refuse = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    assert ChatTemplate(refuse + EITHER, {}).forms["user"] == "string"


def test_a_template_that_drops_the_question_is_refused() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}{% endfor %}", {})
    with pytest.raises(BadInput, match=r"drops the content of user messages.*\n.*--raw"):
        template.fit([{"role": "user", "content": "?"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0] | tojson(indent=1, sort_keys=true, separators=(',', ':')) }}",
        "{% set ns = namespace(a=1) %}{% generation %}{% set ns.a = 2 %}{% set b = 3 %}{% endgeneration %}{{ ns.a }}",
        "{% generation %}{% set b = 3 %}{% endgeneration %}{{ b }}",
        "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}|{{ messages[0].name is defined }}",
        "{{ dict(a=1) }}{{ messages[0].items() | list | length }}",
    ],
)
def test_templates_have_the_functions_of_transformers(folder: Path, source: str) -> None:
    configure(folder, chat_template=source)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "ü <1>", "reasoning": "so", "name": None}]
    ours, theirs = both(folder, messages)
    assert ours == theirs


def test_a_namespace_takes_no_private_names() -> None:
    for source in ("{% set ns = namespace(_a=1) %}", "{% set ns = namespace() %}{% set ns._a = 1 %}"):
        with pytest.raises(BadInput, match="underscore"):
            ChatTemplate(source, {}).render(ASK)
