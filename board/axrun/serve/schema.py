"""What a request may hold, as JSON Schema: what is checked and what /openapi.json publishes are the same tables.

https://platform.openai.com/docs/api-reference/chat/create, https://platform.openai.com/docs/api-reference/completions/create
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, dict[str, Any]]

MAX_CHOICES = 64  # prompts x n of one request
MAX_N = 16
MAX_STOPS = 16
MAX_STOP_IDS = 64
MAX_LENGTH = (1 << 31) - 1
NO_LIMIT = -1  # of tokens
IGNORED = "Accepted; changes nothing here."


def _optional(kind: str, text: str = "", **limits: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], "description": text, **limits}


def _refused(kind: str, **off: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], "description": "Not supported.", "x-refused": True, **off}


def _ignored(*kinds: str) -> dict[str, Any]:
    return {"type": [*kinds, "null"], "description": IGNORED}


def _neutral(value: Any) -> dict[str, Any]:
    """A field that other servers have, with its value that changes nothing."""
    kind = "boolean" if isinstance(value, bool) else "number"
    return _refused(kind, enum=[value, None])


def _limit(text: str, least: int) -> dict[str, Any]:
    """A number of tokens, or -1 for no limit."""
    return {
        "anyOf": [
            {"type": "null"},
            {"type": "integer", "minimum": least, "maximum": MAX_LENGTH},
            {"type": "integer", "enum": [NO_LIMIT]},
        ],
        "title": f"a whole number of at least {least}, or {NO_LIMIT} for no limit",
        "description": text,
    }


COMMON: Fields = {
    "stream": _optional("boolean", "Answer in server-sent events, as tokens come."),
    "stream_options": _optional(
        "object",
        "With stream; include_usage: a last event with the usage.",
        properties={
            "include_usage": _optional("boolean", "A last event with the usage."),
            "include_obfuscation": _ignored("boolean"),
        },
        additionalProperties=False,
    ),
    "temperature": _optional("number", "0: greedy; absent: as the bundle's post_config.json.", minimum=0, maximum=2),
    "top_p": _optional("number", "Draw from the likeliest tokens of this total probability.", minimum=0, maximum=1),
    "top_k": _optional("integer", "Draw from this many likeliest tokens; 0: all.", minimum=0, maximum=MAX_LENGTH),
    "repetition_penalty": _optional("number", "Above 1: recent tokens are less likely.", minimum=0.01, maximum=100),
    "presence_penalty": _optional("number", "Taken from logits of tokens in the answer.", minimum=-2, maximum=2),
    "frequency_penalty": _optional("number", "The same, times how often they are in it.", minimum=-2, maximum=2),
    "logit_bias": _optional(
        "object",
        "Token id to what is added to its logit.",
        propertyNames={"pattern": "^[0-9]{1,9}$"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        maxProperties=1024,
    ),
    "seed": _optional("integer", "Same seed and request, same answer.", minimum=-(1 << 63), maximum=(1 << 63) - 1),
    "n": _optional("integer", "Answers; with a seed, answer i is drawn with seed + i.", minimum=1, maximum=MAX_N),
    "stop": {
        "anyOf": [
            {"type": "null"},
            {"type": "string", "minLength": 1, "maxLength": 256},
            {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "minLength": 1, "maxLength": 256}},
        ],
        "title": f"a string, or a list of up to {MAX_STOPS}, none of them empty",
        "description": "The answer ends before the first of these, special tokens spelled out; it is not part of it.",
    },
    "stop_token_ids": {
        "type": ["array", "null"],
        "description": "The answer ends before the first of these token ids, as before those of the model.",
        "maxItems": MAX_STOP_IDS,
        "items": {"type": "integer", "minimum": 0, "maximum": MAX_LENGTH},
    },
    "ignore_eos": _optional("boolean", "Go on past the tokens that end the model's answers; for benchmarks."),
    "user": _ignored("string"),
    "metadata": _ignored("object"),
    "store": _ignored("boolean"),
    "service_tier": _ignored("string"),
    "safety_identifier": _ignored("string"),
    "prompt_cache_key": _ignored("string"),
    "prompt_cache_retention": _ignored("string"),
    "reasoning_effort": _ignored("string"),
    "verbosity": _ignored("string"),
    "cache_prompt": _ignored("boolean"),
    "cache_control": _ignored("object"),
    "priority": _ignored("integer"),
    "request_id": _ignored("string"),
    "min_p": _neutral(0),
    "typical_p": _neutral(1),
    "tfs_z": _neutral(1),
    "top_a": _neutral(0),
    "mirostat": _neutral(0),
    "xtc_probability": _neutral(0),
    "dry_multiplier": _neutral(0),
    "dynatemp_range": _neutral(0),
    "min_tokens": _neutral(0),
    "length_penalty": _neutral(1),
    "use_beam_search": _neutral(False),
    "skip_special_tokens": _neutral(True),
    "spaces_between_special_tokens": _neutral(True),
    "include_stop_str_in_output": _neutral(False),
}

TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {
        "type": {"type": "string", "enum": ["text"], "description": "Always text."},
        "text": {"type": "string", "description": "The text."},
        "cache_control": _ignored("object"),
    },
    "additionalProperties": False,
}

PARTS = {"type": "array", "minItems": 1, "items": TEXT_PART}


def _message(*roles: str, required: list[str], content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": {
            "role": {"type": "string", "enum": list(roles), "description": "Who speaks; developer is system."},
            "content": {
                "anyOf": content,
                "title": "a string, or a list of parts of type text",
                "description": "What is said; an assistant's may be null.",
            },
            "name": _ignored("string"),
            "cache_control": _ignored("object"),
            # what a client has in an answer that it sends back
            "annotations": _ignored("array"),
            "reasoning": _ignored("string"),
            "reasoning_content": _ignored("string"),
            "refusal": _refused("string", maxLength=0),
            "audio": _refused("object", maxProperties=0),
            "tool_calls": _refused("array", maxItems=0),
            "function_call": _refused("object", maxProperties=0),
        },
        "additionalProperties": False,
    }


ASSISTANT = _message("assistant", required=["role"], content=[{"type": "null"}, {"type": "string"}, PARTS])
MESSAGE = {
    "anyOf": [
        _message("system", "developer", "user", required=["role", "content"], content=[{"type": "string"}, PARTS]),
        ASSISTANT,
    ],
    "title": "an object with a role and content",
}

CHAT: Fields = {
    "messages": {"type": "array", "minItems": 1, "items": MESSAGE, "description": "The conversation so far."},
    **COMMON,
    "max_completion_tokens": _limit("Longest answer; absent, null or -1: to the end of the context.", 1),
    "max_tokens": _limit("The older name of the same.", 1),
    "logprobs": _optional("boolean", "Log probability of every token of the answer."),
    "top_logprobs": _optional("integer", "And of this many likeliest; needs logprobs.", minimum=0, maximum=20),
    "parallel_tool_calls": _ignored("boolean"),
    "chat_template_kwargs": _refused("object", maxProperties=0),
    "add_generation_prompt": _neutral(True),
    "continue_final_message": _neutral(False),
    "response_format": _refused(
        "object",
        required=["type"],
        properties={"type": {"type": "string", "enum": ["text"], "x-refused": True}},
        additionalProperties=False,
    ),
    "modalities": _refused("array", items={"type": "string", "enum": ["text"], "x-refused": True}),
    "tools": _refused("array", maxItems=0),
    "tool_choice": _refused("string", enum=["none", "auto", None]),
    "functions": _refused("array", maxItems=0),
    "function_call": _refused("string", enum=["none", "auto", None]),
    "audio": _refused("object", maxProperties=0),
    "prediction": _refused("object", maxProperties=0),
}

TOKEN = {"type": "integer", "minimum": 0, "maximum": MAX_LENGTH}
TOKENS = {"type": "array", "minItems": 1, "items": TOKEN}

COMPLETION: Fields = {
    "prompt": {
        "description": "What to continue.",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": {"type": "string"}},
            TOKENS,
            {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": TOKENS},
        ],
        "title": f"text, token ids, or a list of up to {MAX_CHOICES} of either, none of them empty",
    },
    **COMMON,
    "max_tokens": {**_limit("Longest answer; absent: 16; null or -1: to the end of the context.", 0), "default": 16},
    "logprobs": _optional(
        "integer", "Log probabilities: the token's, and of so many likeliest.", minimum=0, maximum=20
    ),
    "echo": _optional("boolean", "The prompt before the answer, with log probabilities if asked for."),
    "best_of": _refused("integer", minimum=1, maximum=1),
    "suffix": _refused("string", maxLength=0),
}


def request(fields: Fields, model: str) -> dict[str, Any]:
    """The schema of a request's body; `model` is the only name that is served, and the one that is meant by none."""
    required = [name for name, schema in fields.items() if "null" not in _types(schema)]
    properties = {"model": {"type": ["string", "null"], "enum": [model, None]}, **fields}
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def _types(schema: dict[str, Any]) -> list[str]:
    kinds = [option["type"] for option in schema.get("anyOf", [schema])]
    return [name for kind in kinds for name in (kind if isinstance(kind, list) else [kind])]
