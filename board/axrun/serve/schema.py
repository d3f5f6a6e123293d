"""Request bodies as JSON Schema. The same tables validate requests and are published in /openapi.json.

https://platform.openai.com/docs/api-reference/chat/create, https://platform.openai.com/docs/api-reference/completions/create
"""

from __future__ import annotations

from axrun.serve.field_kinds import (
    MAX_CHOICES,
    MAX_LENGTH,
    MAX_N,
    MAX_STOP_IDS,
    MAX_STOPS,
    MAX_TOOLS,
    Fields,
    ignored,
    limit,
    neutral,
    optional,
    refused,
)
from axrun.serve.messages import FUNCTION, MESSAGE

RESPONSE_FORMAT = optional(
    "object",
    'Form of the answer: {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}. '
    "Every token is chosen so that the answer is valid JSON. A schema that cannot be enforced is refused.",
    required=["type"],
    properties={
        "type": {"type": "string", "enum": ["text", "json_object", "json_schema"]},
        "json_schema": optional(
            "object",
            "The schema, always enforced.",
            required=["schema"],
            properties={
                "name": ignored("string"),
                "description": ignored("string"),
                "strict": ignored("boolean"),
                "schema": {"type": "object", "description": "A JSON schema."},
            },
            additionalProperties=False,
        ),
        "schema": optional("object", "With json_object: a JSON schema, as in llama.cpp."),
    },
    additionalProperties=False,
)

COMMON: Fields = {
    "stream": optional("boolean", "Stream the answer as server-sent events."),
    "stream_options": optional(
        "object",
        "Options of a stream; include_usage adds a last event with the token counts.",
        properties={
            "include_usage": optional("boolean", "Send a last event with the token counts."),
            "include_obfuscation": ignored("boolean"),
        },
        additionalProperties=False,
    ),
    "temperature": optional(
        "number", "Sampling temperature. 0: greedy; absent: as in the bundle's post_config.json.", minimum=0, maximum=2
    ),
    "top_p": optional(
        "number",
        "Sample from the smallest set of most likely tokens with this total probability.",
        minimum=0,
        maximum=1,
    ),
    "top_k": optional("integer", "Sample from this many most likely tokens; 0: all.", minimum=0, maximum=MAX_LENGTH),
    "min_p": optional(
        "number", "Sample from tokens with at least this share of the top token's probability.", minimum=0, maximum=1
    ),
    "typical_p": optional(
        "number", "Sample from the most typical tokens with this total probability; 1: off.", minimum=0.001, maximum=1
    ),
    "top_n_sigma": optional(
        "number",
        "Sample from logits at most this many standard deviations below the largest; 0: off.",
        minimum=0,
        maximum=1000,
    ),
    "xtc_probability": optional("number", "Probability to exclude all top choices but the last.", minimum=0, maximum=1),
    "xtc_threshold": optional("number", "Least probability of a top choice; absent: 0.1.", minimum=0.001, maximum=1),
    "dry_multiplier": optional("number", "Penalty for continuing a repetition; 0: off.", minimum=0, maximum=100),
    "dry_base": optional(
        "number", "Growth of the penalty with each token of the repetition; absent: 1.75.", minimum=1, maximum=4
    ),
    "dry_allowed_length": optional(
        "integer", "Repetitions shorter than this are free; absent: 2.", minimum=1, maximum=64
    ),
    "dry_penalty_last_n": optional(
        "integer", "Number of recent tokens to search for repetitions; -1: all.", minimum=-1, maximum=MAX_LENGTH
    ),
    "dry_sequence_breakers": {
        "type": ["array", "null"],
        "description": "Texts that no repetition extends across; absent: line feed, colon, quote and asterisk.",
        "maxItems": MAX_STOPS,
        "items": {"type": "string", "minLength": 1, "maxLength": 64},
    },
    "repetition_penalty": optional("number", "Above 1: makes recent tokens less likely.", minimum=0.01, maximum=100),
    "repeat_penalty": optional("number", "llama.cpp's name of repetition_penalty.", minimum=0.01, maximum=100),
    "repeat_last_n": optional(
        "integer",
        "Number of recent tokens that the repetition penalty applies to; -1: all.",
        minimum=-1,
        maximum=MAX_LENGTH,
    ),
    "presence_penalty": optional(
        "number", "Subtracted from the logits of tokens that are in the answer.", minimum=-2, maximum=2
    ),
    "frequency_penalty": optional(
        "number", "Subtracted once for each occurrence of the token in the answer.", minimum=-2, maximum=2
    ),
    "logit_bias": optional(
        "object",
        "Map from token id to a number that is added to its logit.",
        propertyNames={"pattern": "^(0|[1-9][0-9]{0,8})$", "title": "a token id"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        maxProperties=1024,
    ),
    "seed": optional(
        "integer", "Seed of the sampler: same seed and request, same answer.", minimum=-(1 << 63), maximum=(1 << 63) - 1
    ),
    "n": optional("integer", "Number of answers; with a seed, answer i uses seed + i.", minimum=1, maximum=MAX_N),
    "stop": {
        "anyOf": [
            {"type": "null"},
            {"type": "string", "minLength": 1, "maxLength": 256},
            {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "minLength": 1, "maxLength": 256}},
        ],
        "title": f"a string, or a list of up to {MAX_STOPS}, none of them empty",
        "description": "Stop strings: the answer ends before the first of them. They may spell special tokens.",
    },
    "stop_token_ids": {
        "type": ["array", "null"],
        "description": "Token ids that end the answer, in addition to those of the model.",
        "maxItems": MAX_STOP_IDS,
        "items": {"type": "integer", "minimum": 0, "maximum": MAX_LENGTH},
    },
    "response_format": RESPONSE_FORMAT,
    "ignore_eos": optional("boolean", "Continue past the model's stop tokens; for benchmarks."),
    "user": ignored("string"),
    "metadata": ignored("object"),
    "store": ignored("boolean"),
    "service_tier": ignored("string"),
    "safety_identifier": ignored("string"),
    "prompt_cache_key": ignored("string"),
    "prompt_cache_retention": ignored("string"),
    "id_slot": ignored("integer"),
    "timings_per_token": ignored("boolean"),
    "keep_alive": ignored("string", "integer"),
    "verbosity": ignored("string"),
    "cache_prompt": ignored("boolean"),
    "cache_control": ignored("object"),
    "priority": ignored("integer"),
    "request_id": ignored("string"),
    "tfs_z": neutral(1),
    "top_a": neutral(0),
    "mirostat": neutral(0),
    "dynatemp_range": neutral(0),
    "min_tokens": neutral(0),
    "length_penalty": neutral(1),
    "use_beam_search": neutral(False),
    "skip_special_tokens": neutral(True),
    "spaces_between_special_tokens": neutral(True),
    "include_stop_str_in_output": neutral(False),
}

CHAT: Fields = {
    "messages": {"type": "array", "minItems": 1, "items": MESSAGE, "description": "The conversation so far."},
    **COMMON,
    "max_completion_tokens": limit(
        "Maximum number of tokens of the answer; absent, null or -1: to the end of the context.", 1
    ),
    "max_tokens": limit("Older name of max_completion_tokens.", 1),
    "logprobs": optional("boolean", "Return the log probability of every token of the answer."),
    "top_logprobs": optional(
        "integer", "Number of most likely tokens to return at each position; needs logprobs.", minimum=0, maximum=20
    ),
    "tools": {
        "type": ["array", "null"],
        "maxItems": MAX_TOOLS,
        "items": FUNCTION,
        "description": "Functions that the model may call.",
    },
    "tool_choice": {
        "anyOf": [
            {"type": ["string", "null"], "enum": ["none", "auto", "required", None]},
            {
                "type": "object",
                "required": ["type", "function"],
                "properties": {
                    "type": {"type": "string", "enum": ["function"]},
                    "function": {
                        "type": "object",
                        "required": ["name"],
                        "properties": {"name": {"type": "string"}},
                        "additionalProperties": False,
                    },
                },
                "additionalProperties": False,
            },
        ],
        "title": '"none", "auto", "required" or a function by its name',
        "description": "Whether tools may or must be called. With required or a name, the arguments are valid.",
    },
    "parallel_tool_calls": optional("boolean", "If false, at most one call."),
    "chat_template_kwargs": optional(
        "object", "Variables for the chat template, e.g. enable_thinking.", maxProperties=64
    ),
    "reasoning_effort": optional(
        "string", "Variable reasoning_effort of the chat template; none also turns thinking off."
    ),
    "thinking_budget": optional(
        "integer",
        "Maximum number of tokens of the thoughts; absent: as --reasoning-budget says.",
        minimum=0,
        maximum=MAX_LENGTH,
    ),
    "enable_thinking": optional("boolean", "Whether to think, if the chat template has a switch for it."),
    "add_generation_prompt": neutral(True),
    "continue_final_message": neutral(False),
    "modalities": refused("array", items={"type": "string", "enum": ["text"], "x-refused": "leave it out"}),
    "functions": refused("array", maxItems=0),
    "function_call": refused("string", enum=["none", "auto", None]),
    "audio": refused("object", maxProperties=0),
    "prediction": refused("object", maxProperties=0),
}

TOKEN = {"type": "integer", "minimum": 0, "maximum": MAX_LENGTH}
TOKENS = {"type": "array", "minItems": 1, "items": TOKEN}

COMPLETION: Fields = {
    "prompt": {
        "description": "The text to continue.",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": {"type": "string"}},
            TOKENS,
            {"type": "array", "minItems": 1, "maxItems": MAX_CHOICES, "items": TOKENS},
        ],
        "title": f"text, token ids, or a list of up to {MAX_CHOICES} of either, none of them empty",
    },
    **COMMON,
    "max_tokens": {
        **limit("Maximum number of tokens; absent: 16; null or -1: to the end of the context.", 0),
        "default": 16,
    },
    "logprobs": optional(
        "integer", "Return log probabilities of each token and of this many most likely ones.", minimum=0, maximum=20
    ),
    "echo": optional("boolean", "Return the prompt before the answer, with log probabilities if requested."),
    "best_of": refused("integer", minimum=1, maximum=1),
    "suffix": refused("string", maxLength=0),
}
