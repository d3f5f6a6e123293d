"""/tokenize and /detokenize, with the fields of llama-server and of vLLM.

https://github.com/ggml-org/llama.cpp/tree/master/tools/server#post-tokenize-tokenize-a-given-text
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from axrun.errors import BadInput
from axrun.serve import schema
from axrun.serve.errors import invalid
from axrun.serve.field_kinds import IGNORED, Fields
from axrun.serve.order import Reader

TOKENIZE: Fields = {
    "content": {"type": ["string", "null"], "description": "The text."},
    "prompt": {"type": ["string", "null"], "description": "The text, under vLLM's name."},
    "add_special": {"type": ["boolean", "null"], "description": "Add the tokens that begin a text; absent: false."},
    "add_special_tokens": {"type": ["boolean", "null"], "description": "The same under vLLM's name; absent: true."},
    "parse_special": {"type": ["boolean", "null"], "description": IGNORED},
}
DETOKENIZE: Fields = {"tokens": {**schema.TOKENS, "minItems": 0, "description": "The token ids."}}


def tokenize(reader: Reader, body: Mapping[str, Any]) -> dict[str, Any]:
    """The token ids of a text. Special tokens that it spells are control tokens, as in the prompt of completions."""
    text = body.get("content", body.get("prompt"))
    if text is None:
        raise invalid("Missing required parameter: 'content'.", "content", "missing_required_parameter")
    special = body.get("add_special", False) if "content" in body else body.get("add_special_tokens", True)
    try:
        ids = reader.tokenizer.encode(text, special)
    except BadInput as error:
        raise invalid(str(error), "content") from None
    return {"tokens": ids, "count": len(ids), "max_model_len": reader.context}


def detokenize(reader: Reader, body: Mapping[str, Any]) -> dict[str, Any]:
    """The text of token ids, special tokens spelled out."""
    reader.expect_within(body["tokens"], "tokens")
    text = reader.tokenizer.decode(body["tokens"], special=True)
    return {"content": text, "prompt": text}
