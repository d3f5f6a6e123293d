"""Faults of tokenizer and template: other ids, another prompt, another stop condition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.axc import tokenizer_kinds
from tests.doctor.axmodels import manifest, replace
from tests.doctor.fault import Fault

TOKENIZER, SETTINGS, GENERATION = "hf/tokenizer.json", "hf/tokenizer_config.json", "hf/generation_config.json"
BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [637], "tokens": ["<|endoftext|>"]}},
}
Edit = Callable[[dict[str, Any]], object]


def in_json(name: str, change: Edit) -> Callable[[Path, Path], None]:
    """Changes one JSON file."""

    def plant(bundle: Path, checkpoint: Path) -> None:
        values = json.loads((bundle / name).read_text("utf-8"))
        change(values)
        replace(bundle, name, json.dumps(values).encode())

    return plant


def in_template(old: str, new: str) -> Callable[[Path, Path], None]:
    def change(values: dict[str, Any]) -> None:
        assert old in values["chat_template"]
        values["chat_template"] = values["chat_template"].replace(old, new)

    return in_json(SETTINGS, change)


def other_tokenizer(bundle: Path, checkpoint: Path) -> None:
    replace(bundle, TOKENIZER, tokenizer_kinds.byte_level().to_str().encode())


def exchange(values: dict[str, Any]) -> None:
    """Swaps the ids of two tokens."""
    vocab = values["model"]["vocab"]
    one, other = (next(token for token, number in vocab.items() if number == wanted) for wanted in (600, 601))
    vocab[one], vocab[other] = vocab[other], vocab[one]


def lose_an_added_token(values: dict[str, Any]) -> None:
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != "<|im_start|>"]


def flag(name: str, value: bool) -> Edit:
    def change(values: dict[str, Any]) -> None:
        values["added_tokens"][2][name] = value

    return change


def prefix_space(values: dict[str, Any]) -> None:
    values["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def ligature(values: dict[str, Any]) -> None:
    """Another rule for one rare character."""
    rule = {"type": "Replace", "pattern": {"String": "\u0153"}, "content": "oe"}
    values["normalizer"] = {"type": "Sequence", "normalizers": [values["normalizer"], rule]}


def another_stop(bundle: Path, checkpoint: Path) -> None:
    """Adds a stop id to the files and the manifest."""
    in_json(GENERATION, lambda values: values.update(eos_token_id=[639, 637, 100]))(bundle, checkpoint)
    manifest(bundle, lambda values: values["text"]["stop_ids"].update({"100": ["generation_config.json"]}))


def add_a_template(bundle: Path, checkpoint: Path) -> None:
    replace(bundle, "hf/chat_template.jinja", tokenizer_kinds.LLAMA2.encode())


def tokenizer() -> list[Fault]:
    def ids(name: str, change: Edit, says: str = "") -> Fault:
        return Fault(name, "s8", "tokenizer", TOKENIZER, in_json(TOKENIZER, change), says=says)

    return [
        Fault("tokenizer.json of another model", "s8", "tokenizer", TOKENIZER, other_tokenizer),
        ids("the last merge is missing", lambda values: values["model"]["merges"].pop()),
        ids("an early merge is missing", lambda values: values["model"]["merges"].pop(20)),
        ids("the ids of two tokens are swapped", exchange),
        ids("an added token is missing", lose_an_added_token),
        ids("the normalizer is missing", lambda values: values.update(normalizer=None)),
        ids("the normalizer lowercases", lambda values: values.update(normalizer={"type": "Lowercase"})),
        ids("a space is added before a text", prefix_space),
        ids("a BOS is added before a text", lambda values: values.update(post_processor=BOS)),
        ids("the normalizer has an extra rule", ligature, "normalizer"),
        ids("the model drops merges at random", lambda values: values["model"].update(dropout=0.01), "dropout|model"),
        ids("the decoder is another", lambda values: values.update(decoder={"type": "Fuse"})),
        ids("an added token strips spaces on the left", flag("lstrip", True)),
        ids("a special token is not special", flag("special", False)),
    ]


def template() -> list[Fault]:
    def stops(name: str, file: str, change: Edit) -> Fault:
        return Fault(name, "s8", "template", file, in_json(file, change), says="stop|eos|end")

    def prompt(name: str, old: str, new: str, base: str = "s8", says: str = "") -> Fault:
        return Fault(name, base, "template", SETTINGS, in_template(old, new), says=says)

    return [
        Fault(
            "another chat template",
            "s8",
            "template",
            SETTINGS,
            in_json(SETTINGS, lambda values: values.update(chat_template=tokenizer_kinds.LLAMA2)),
        ),
        Fault("an extra template file takes precedence", "s8", "template", "hf/chat_template.jinja", add_a_template),
        Fault(
            "the chat template is missing",
            "s8",
            "template",
            SETTINGS,
            in_json(SETTINGS, lambda values: values.pop("chat_template")),
        ),
        Fault(
            "the chat template is not valid Jinja",
            "s8",
            "template",
            SETTINGS,
            in_json(SETTINGS, lambda values: values.update(chat_template="{% if %}")),
        ),
        prompt("the generation prompt is missing", "{% if add_generation_prompt %}", "{% if false %}"),
        prompt("another default system message", "You are a helpful assistant.", "You are Qwen."),
        prompt("no line feed after a turn", "'<|im_end|>\\n' }}{% endfor %}", "'<|im_end|>' }}{% endfor %}"),
        prompt("messages are trimmed", "+ message['content'] +", "+ message['content'].strip() +"),
        prompt(
            "long conversations get an extra prefix",
            "{% for",
            "{% if messages|length > 8 %}X{% endif %}{% for",
            says="text|template",
        ),
        prompt("long messages are truncated", "message['content']", "message['content'][:200]", says="text|template"),
        Fault("an extra stop id", "s8", "template", f"{GENERATION}|manifest.json", another_stop, says="100"),
        prompt("the template drops BOS", "{{ bos_token }}", "", "llama", says="BOS|bos|begin|first|endoftext"),
        Fault(
            "another token is BOS",
            "llama",
            "tokenizer|template",
            SETTINGS,
            in_json(SETTINGS, lambda values: values.update(bos_token="<|im_start|>")),
        ),
        stops("a stop id is missing", GENERATION, lambda values: values.update(eos_token_id=639)),
        stops("a wrong stop id in the list", GENERATION, lambda values: values.update(eos_token_id=[639, 637, 638])),
        stops("no stop id in generation_config.json", GENERATION, lambda values: values.pop("eos_token_id")),
        stops("a letter is a stop id", "hf/config.json", lambda values: values.update(eos_token_id=65)),
    ]


def sampling() -> list[Fault]:
    def post_config(name: str, **changes: object) -> Fault:
        plant = in_json("post_config.json", lambda values: values.update(changes))
        return Fault(name, "s8", "sampling", "post_config.json", plant, says="|".join(changes) + "|penalty|draw|greedy")

    return [
        post_config("post_config.json penalises repetition", enable_repetition_penalty=True, repetition_penalty=1.5),
        post_config("post_config.json samples", enable_temperature=True, temperature=0.8, enable_top_k_sampling=True),
    ]
