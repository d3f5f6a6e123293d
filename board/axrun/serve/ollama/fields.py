"""The fields of requests to /api/chat, /api/generate and /api/show."""

from __future__ import annotations

from typing import Any

from axrun.serve import messages
from axrun.serve.field_kinds import MAX_LENGTH, MAX_TOOLS, Fields, ignored, neutral, optional, refused
from axrun.serve.schema import COMMON

SHARED = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "repeat_last_n"),
    *("presence_penalty", "frequency_penalty", "seed", "stop", "tfs_z", "mirostat"),
)
LOADING = (
    *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram", "f16_kv"),
    *("use_mmap", "use_mlock", "vocab_only", "logits_all", "embedding_only"),
    *("mirostat_tau", "mirostat_eta", "penalize_newline"),
)
ENDLESS = (-1, -2)  # values of num_predict
TEXT_ONLY = "it reads text only"

OPTIONS: Fields = {
    **{name: COMMON[name] for name in SHARED},
    "num_predict": {
        "anyOf": [
            {"type": "null"},
            {"type": "integer", "minimum": 1, "maximum": MAX_LENGTH},
            {"type": "integer", "enum": list(ENDLESS)},
        ],
        "title": "a whole number of at least 1, or -1 or -2 for no limit",
        "description": "Maximum number of tokens of the answer; absent: to the end of the context.",
    },
    **{name: ignored("number", "boolean") for name in LOADING},
}
CALL = {
    "type": "object",
    "required": ["function"],
    "properties": {
        "id": ignored("string"),
        "type": ignored("string"),
        "function": {
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 256},
                "index": ignored("integer"),
                "description": ignored("string"),
                "arguments": optional("object", "The arguments."),
            },
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}
MESSAGE: dict[str, Any] = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {
            "type": "string",
            "enum": ["system", "user", "assistant", "tool"],
            "description": "The author of the message.",
        },
        "content": optional("string", "The text of the message."),
        "thinking": optional("string", "The thoughts before the content, for the chat template."),
        "tool_calls": {"type": ["array", "null"], "items": CALL, "description": "The calls of the answer."},
        "tool_name": optional("string", "The name of the function that this is the result of."),
        "tool_call_id": ignored("string"),
        "images": refused("array", TEXT_ONLY, maxItems=0),
    },
    "additionalProperties": False,
}

WRITING: Fields = {
    "stream": optional("boolean", "Stream the answer as lines of JSON; absent: true."),
    "format": {
        "anyOf": [{"type": ["string", "null"], "enum": ["", "json", None]}, {"type": "object"}],
        "title": '"json", or a JSON schema',
        "description": "Form of the answer, enforced as response_format is.",
    },
    "options": optional(
        "object", "Options of the sampler, and num_predict.", properties=OPTIONS, additionalProperties=False
    ),
    "think": {
        "anyOf": [{"type": ["boolean", "null"]}, {"type": "string"}],
        "title": "an effort, true or false",
        "description": "Whether to think; a string is reasoning_effort.",
    },
    "keep_alive": ignored("string", "number"),
    "truncate": ignored("boolean"),
    "shift": ignored("boolean"),
    "logprobs": neutral(False),
    "top_logprobs": neutral(0),
}
CHAT: Fields = {
    "messages": {
        "type": ["array", "null"],
        "items": MESSAGE,
        "description": "The conversation so far; none: only load the model.",
    },
    **WRITING,
    "tools": {
        "type": ["array", "null"],
        "maxItems": MAX_TOOLS,
        "items": messages.FUNCTION,
        "description": "Functions that the model may call.",
    },
}
GENERATE: Fields = {
    "prompt": optional("string", "The question, or with raw the text to continue; none: only load the model."),
    "system": optional("string", "The system message."),
    "raw": optional("boolean", "Use the prompt as it is, without the chat template."),
    **WRITING,
    "template": refused("string", maxLength=0),
    "suffix": refused("string", maxLength=0),
    "context": refused("array", "send the conversation to /api/chat", maxItems=0),
    "images": refused("array", TEXT_ONLY, maxItems=0),
}
SHOW: Fields = {"verbose": ignored("boolean")}
