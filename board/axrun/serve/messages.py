"""Messages, tool calls and tools of a chat request as JSON Schema.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from typing import Any

from axrun.serve.field_kinds import PARSED, Fields, ignored, optional, refused

TEXT_PART: dict[str, Any] = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {
        "type": {"type": "string", "enum": ["text"], "description": "The type of the part: text."},
        "text": {"type": "string", "description": "The text."},
        "cache_control": ignored("object"),
    },
    "additionalProperties": False,
}

PARTS = {"type": "array", "minItems": 1, "items": TEXT_PART}


def _message(*roles: str, required: list[str], content: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": {
            "role": {
                "type": "string",
                "enum": list(roles),
                "description": "The author of the message; developer is treated as system.",
            },
            "content": {
                "anyOf": content,
                "title": "a string, or a list of parts of type text",
                "description": "The content of the message; an assistant's may be null.",
            },
            "name": ignored("string"),
            "cache_control": ignored("object"),
            # fields of an answer that clients send back in the history
            "annotations": ignored("array"),
            "parsed": PARSED,
            "reasoning": optional("string", "Another name of reasoning_content."),
            "reasoning_content": optional("string", "The thoughts before the content, for the chat template."),
            "refusal": refused("string", maxLength=0),
            "audio": refused("object", maxProperties=0),
            **more,
            "function_call": refused("object", maxProperties=0),
        },
        "additionalProperties": False,
    }


TOOL_CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "id": optional("string", "The id of the call."),
        "type": {"type": "string", "enum": ["function"]},
        "index": ignored("integer"),
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 256},
                "arguments": {
                    "anyOf": [{"type": "null"}, {"type": "string"}, {"type": "object"}],
                    "title": "the JSON of an object",
                },
                "parsed_arguments": PARSED,
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}
NO_CALLS = refused("array", maxItems=0)
CALLS = {"type": ["array", "null"], "items": TOOL_CALL, "description": "The calls of the answer."}
CALL_ID = optional("string", "The id of the call that this is the result of.")
ASSISTANT: dict[str, Any] = _message(
    "assistant", required=["role"], content=[{"type": "null"}, {"type": "string"}, PARTS], tool_calls=CALLS
)
TOOL = _message(
    "tool", required=["role", "content"], content=[{"type": "string"}, PARTS], tool_calls=NO_CALLS, tool_call_id=CALL_ID
)
MESSAGE_FIELDS: Fields = {**ASSISTANT["properties"], "tool_call_id": CALL_ID}
MESSAGE = {
    "anyOf": [
        _message(
            *("system", "developer", "user"),
            required=["role", "content"],
            content=[{"type": "string"}, PARTS],
            tool_calls=NO_CALLS,
        ),
        ASSISTANT,
        TOOL,
    ],
    "title": "an object with a role and content",
}

FUNCTION = {
    "type": "object",
    "required": ["type", "function"],
    "properties": {
        "type": {"type": "string", "enum": ["function"]},
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 256},
                "description": optional("string"),
                "parameters": optional("object", "A JSON schema of the arguments."),
                "strict": ignored("boolean"),
            },
            "additionalProperties": False,
        },
        "cache_control": ignored("object"),
    },
    "additionalProperties": False,
}
