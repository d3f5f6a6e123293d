"""The fields of a request to /v1/responses."""

from __future__ import annotations

from typing import Any

from axrun.serve.field_kinds import IGNORED, MAX_TOOLS, PARSED, Fields, ignored, limit, neutral, optional, refused
from axrun.serve.schema import CHAT, COMMON

STATELESS = "it stores nothing, so send the whole conversation as input"
# what a request shares with chat completions, under the same names
OTHER_NAMES = ("stream_options", "n", "response_format")
SHARED: Fields = {
    **{name: field for name, field in COMMON.items() if name not in OTHER_NAMES},
    **{
        name: CHAT[name]
        for name in ("parallel_tool_calls", "chat_template_kwargs", "thinking_budget", "enable_thinking")
    },
}


def _item(kind: str, required: list[str], **properties: Any) -> dict[str, Any]:
    """An item of the input. Only a message may leave out its type."""
    optional_type = kind == "message"
    named = {"type": ["string", "null"], "enum": [kind, None]} if optional_type else {"type": "string", "enum": [kind]}
    return {
        "type": "object",
        "required": required if optional_type else ["type", *required],
        "properties": {
            "type": {**named, "description": "The type of the item."},
            "id": ignored("string"),
            "status": ignored("string"),
            **properties,
        },
        "additionalProperties": False,
    }


def _parts(*kinds: str) -> dict[str, Any]:
    return {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["type", "text"],
            "properties": {
                "type": {"type": "string", "enum": list(kinds), "description": "The type of the part."},
                "text": {"type": "string", "description": "The text."},
                "annotations": ignored("array"),
                "logprobs": ignored("array"),
                "parsed": PARSED,
                "prompt_cache_breakpoint": ignored("object"),
            },
            "additionalProperties": False,
        },
    }


TEXT = {"anyOf": [{"type": "string"}, _parts("input_text", "output_text", "text")], "title": "a string, or text parts"}
MESSAGE = _item(
    "message",
    ["role", "content"],
    role={
        "type": "string",
        "enum": ["user", "assistant", "system", "developer"],
        "description": "The author of the message; developer is treated as system.",
    },
    content={**TEXT, "description": "The text of the message."},
    phase=ignored("string"),
)
CALL = _item(
    "function_call",
    ["call_id", "name", "arguments"],
    call_id={"type": "string", "description": "The id of the call."},
    name={"type": "string", "minLength": 1, "maxLength": 256, "description": "The name of the function."},
    arguments={"type": "string", "description": "The JSON of an object."},
    parsed_arguments=PARSED,
    async_=refused("boolean", enum=[False, None]),
    caller=refused("object", maxProperties=0),
    namespace=refused("string", maxLength=0),
)
OUTPUT = _item(
    "function_call_output",
    ["call_id", "output"],
    call_id={"type": "string", "description": "The id of the call that this is the result of."},
    output={**TEXT, "description": "The result of the call."},
)
REASONING = _item(
    "reasoning",
    [],
    summary={
        **_parts("summary_text"),
        "type": ["array", "null"],
        "description": "The thoughts of an earlier answer, if content is absent.",
    },
    content={
        **_parts("reasoning_text", "text"),
        "type": ["array", "null"],
        "description": "The thoughts of an earlier answer, for the chat template.",
    },
    encrypted_content=ignored("string"),
)
ITEMS = (MESSAGE, CALL, OUTPUT, REASONING)

TOOL = {
    "type": "object",
    "required": ["type", "name"],
    "properties": {
        "type": {"type": "string", "enum": ["function"]},
        "name": {"type": "string", "minLength": 1, "maxLength": 256},
        "description": optional("string"),
        "parameters": optional("object", "A JSON schema of the arguments."),
        "strict": ignored("boolean"),
    },
    "additionalProperties": False,
}
FORMAT = optional(
    "object",
    required=["type"],
    properties={
        "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
        "name": ignored("string"),
        "description": ignored("string"),
        "strict": ignored("boolean"),
        "schema": optional("object", "With json_schema: a JSON schema, always enforced."),
    },
    additionalProperties=False,
)

FIELDS: Fields = {
    "input": {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "items": {"anyOf": ITEMS, "title": "an item with a type"}},
        ],
        "title": "text, or a list of items",
        "description": "The conversation: messages, function calls, their outputs, and reasoning.",
    },
    "instructions": optional("string", "A system message before the input."),
    **SHARED,
    "stream_options": optional(
        "object", IGNORED, properties={"include_obfuscation": ignored("boolean")}, additionalProperties=False
    ),
    "max_output_tokens": limit("Maximum number of tokens of the answer; absent: to the end of the context.", 1),
    "tools": {
        "type": ["array", "null"],
        "maxItems": MAX_TOOLS,
        "items": TOOL,
        "description": "Functions that the model may call.",
    },
    "tool_choice": {
        "anyOf": [
            {"type": ["string", "null"], "enum": ["none", "auto", "required", None]},
            {
                "type": "object",
                "required": ["type", "name"],
                "properties": {"type": {"type": "string", "enum": ["function"]}, "name": {"type": "string"}},
                "additionalProperties": False,
            },
        ],
        "title": '"none", "auto", "required" or a function by its name',
        "description": "Whether tools may or must be called. With required or a name, the arguments are valid.",
    },
    "text": optional(
        "object",
        'Form of the answer, enforced as response_format is: {"format": {"type": "json_schema", "schema": ...}}, '
        'or {"format": {"type": "json_object"}}.',
        properties={"format": FORMAT, "verbosity": ignored("string")},
        additionalProperties=False,
    ),
    "reasoning": optional(
        "object",
        "effort is the variable reasoning_effort of the chat template; none also turns thinking off.",
        properties={
            "effort": optional("string", "The effort."),
            **{name: ignored("string") for name in ("summary", "generate_summary", "context", "mode")},
        },
        additionalProperties=False,
    ),
    "include": {"type": ["array", "null"], "items": {"type": "string"}, "description": IGNORED},
    "max_tool_calls": ignored("integer"),
    "prompt_cache_options": ignored("object"),
    "previous_response_id": refused("string", STATELESS, enum=[None]),
    "conversation": refused("string", STATELESS, enum=[None]),
    "background": neutral(False),
    "prompt": refused("object", maxProperties=0),
    "truncation": refused("string", enum=["disabled", None]),
    "top_logprobs": neutral(0),
}
