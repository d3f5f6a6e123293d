"""The bodies of responses as JSON Schema: the components of the OpenAPI document."""

from __future__ import annotations

from typing import Any

INTEGER = {"type": "integer"}
STRING = {"type": "string"}
NUMBER = {"type": "number"}
BOOLEAN = {"type": "boolean"}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _nullable(of: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [of, {"type": "null"}]}


def ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


FINISH = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
ITEM_STATUS = {"type": "string", "enum": ["completed", "incomplete"]}
OLLAMA = {"model": STRING, "created_at": STRING, "done": {"const": True}, "done_reason": STRING}
OLLAMA_FIGURES = dict.fromkeys(
    (
        *("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration"),
        *("eval_count", "eval_duration"),
    ),
    INTEGER,
)
OLLAMA_DETAILS = _object(
    {
        **dict.fromkeys(("parent_model", "format", "family", "parameter_size", "quantization_level"), STRING),
        "families": _list(STRING),
    }
)
HEAD = {"id": STRING, "created": INTEGER, "model": STRING, "system_fingerprint": STRING}

SCHEMAS: dict[str, Any] = {
    "Error": _object(
        {"error": _object({"message": STRING, "type": STRING, "param": _nullable(STRING), "code": _nullable(STRING)})}
    ),
    "Usage": _object(
        {"prompt_tokens": INTEGER, "completion_tokens": INTEGER, "total_tokens": INTEGER},
        prompt_tokens_details=_object({"cached_tokens": INTEGER}),
    ),
    "TokenLogprob": _object(
        {
            "token": STRING,
            "logprob": NUMBER,
            "bytes": _list(INTEGER),
            "top_logprobs": _list(_object({"token": STRING, "logprob": NUMBER, "bytes": _list(INTEGER)})),
        }
    ),
    "ToolCall": _object(
        {
            "id": STRING,
            "type": {"const": "function"},
            "function": _object({"name": STRING, "arguments": STRING}),
        }
    ),
    "ChatCompletion": _object(
        {
            **HEAD,
            "object": {"const": "chat.completion"},
            "choices": _list(
                _object(
                    {
                        "index": INTEGER,
                        "message": _object(
                            {"role": {"const": "assistant"}, "content": _nullable(STRING)},
                            tool_calls=_list(ref("ToolCall")),
                            reasoning_content=STRING,
                        ),
                        "logprobs": _nullable(_object({"content": _list(ref("TokenLogprob"))})),
                        "finish_reason": FINISH,
                    }
                )
            ),
            "usage": ref("Usage"),
        }
    ),
    "Completion": _object(
        {
            **HEAD,
            "object": {"const": "text_completion"},
            "choices": _list(
                _object(
                    {
                        "index": INTEGER,
                        "text": STRING,
                        "logprobs": _nullable(
                            _object(
                                {
                                    "tokens": _list(STRING),
                                    "token_logprobs": _list(_nullable(NUMBER)),
                                    "top_logprobs": _list(
                                        _nullable({"type": "object", "additionalProperties": NUMBER})
                                    ),
                                    "text_offset": _list(INTEGER),
                                }
                            )
                        ),
                        "finish_reason": FINISH,
                    }
                )
            ),
            "usage": ref("Usage"),
        }
    ),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": INTEGER,
                        "embedding": {"anyOf": [_list(NUMBER), STRING]},  # a string with encoding_format base64
                    }
                )
            ),
            "model": STRING,
            "usage": _object({"prompt_tokens": INTEGER, "total_tokens": INTEGER}),
        }
    ),
    "Response": _object(
        {
            "id": STRING,
            "object": {"const": "response"},
            "created_at": INTEGER,
            "model": STRING,
            "status": {"type": "string", "enum": ["completed", "incomplete"]},
            "incomplete_details": _nullable(_object({"reason": {"const": "max_output_tokens"}})),
            "output": _list({"anyOf": [ref("OutputMessage"), ref("FunctionCall"), ref("Reasoning")]}),
            "usage": _object(
                {
                    "input_tokens": INTEGER,
                    "input_tokens_details": _object({"cached_tokens": INTEGER}),
                    "output_tokens": INTEGER,
                    "output_tokens_details": _object({"reasoning_tokens": INTEGER}),
                    "total_tokens": INTEGER,
                }
            ),
        }
    ),
    "OutputMessage": _object(
        {
            "id": STRING,
            "type": {"const": "message"},
            "status": ITEM_STATUS,
            "role": {"const": "assistant"},
            "content": _list(_object({"type": {"const": "output_text"}, "text": STRING})),
        }
    ),
    "FunctionCall": _object(
        {
            "id": STRING,
            "type": {"const": "function_call"},
            "status": ITEM_STATUS,
            "call_id": STRING,
            "name": STRING,
            "arguments": STRING,
        }
    ),
    "Reasoning": _object(
        {
            "id": STRING,
            "type": {"const": "reasoning"},
            "status": ITEM_STATUS,
            "summary": {"type": "array", "maxItems": 0},
            "content": _list(_object({"type": {"const": "reasoning_text"}, "text": STRING})),
        }
    ),
    "OllamaError": _object({"error": STRING}),
    "OllamaChat": _object(
        {
            **OLLAMA,
            "message": _object(
                {"role": {"const": "assistant"}, "content": STRING},
                thinking=STRING,
                tool_calls=_list(_object({"function": _object({"name": STRING, "arguments": {"type": "object"}})})),
            ),
        },
        **OLLAMA_FIGURES,
    ),
    "OllamaGenerate": _object({**OLLAMA, "response": STRING}, thinking=STRING, **OLLAMA_FIGURES),
    "OllamaEmbeddings": _object(
        {
            "model": STRING,
            "embeddings": _list(_list(NUMBER)),
            **dict.fromkeys(("total_duration", "load_duration", "prompt_eval_count"), INTEGER),
        }
    ),
    "OllamaShow": _object(
        {
            "modified_at": STRING,
            "details": OLLAMA_DETAILS,
            "template": STRING,
            "parameters": STRING,
            "model_info": {"type": "object"},
            "capabilities": _list(STRING),
        }
    ),
    "OllamaModels": _object(
        {
            "models": _list(
                _object(
                    {
                        **dict.fromkeys(("name", "model", "modified_at", "digest"), STRING),
                        "size": INTEGER,
                        "details": OLLAMA_DETAILS,
                    }
                )
            )
        }
    ),
    "OllamaVersion": _object({"version": STRING}),
    "Tokens": _object({"tokens": _list(INTEGER), "count": INTEGER, "max_model_len": INTEGER}),
    "Text": _object({"content": STRING, "prompt": STRING}),
    "Model": _object(
        {
            "id": STRING,
            "object": {"const": "model"},
            "created": INTEGER,
            "owned_by": STRING,
            "context_length": INTEGER,  # tokens of prompt and answer
            "family": STRING,
            "weight_type": STRING,
            "bits": _nullable(NUMBER),  # of a weight, without scales
            "embeddings": BOOLEAN,
            "text": BOOLEAN,  # whether it answers chats and completions
            "loaded": BOOLEAN,
            "aliases": _list(STRING),
        }
    ),
    "Models": _object({"object": {"const": "list"}, "data": _list(ref("Model"))}),
    "Health": _object(
        {
            "status": {"type": "string", "enum": ["loading", "ok", "stopping"]},
            "model": STRING,
            "context_length": INTEGER,
            "slots": INTEGER,
            "busy": INTEGER,
            "waiting": INTEGER,
            "kv_blocks": INTEGER,
            "kv_blocks_used": INTEGER,
            "kv_blocks_shared": INTEGER,
        },
        loaded=_list(STRING),  # names, if there are several models
    ),
}
