"""/v1/embeddings: https://platform.openai.com/docs/api-reference/embeddings/create"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from axrun.embeddings import Texts, TooLong, Vector, numbers
from axrun.errors import BadInput
from axrun.serve import schema
from axrun.serve.answer import to_json
from axrun.serve.endpoint import Endpoint, WholeReply
from axrun.serve.errors import invalid, sentence
from axrun.serve.field_kinds import IGNORED, MAX_LENGTH, Fields
from axrun.serve.order import Order, Reader, Text
from axrun.serve.writer import Piece

MAX_INPUTS = 2048  # texts in one request, as OpenAI's

FIELDS: Fields = {
    "input": {
        "description": "The texts.",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string"}},
            schema.TOKENS,
            {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": schema.TOKENS},
        ],
        "title": f"text, token ids, or a list of up to {MAX_INPUTS} of either, none of them empty",
    },
    "encoding_format": {
        "type": ["string", "null"],
        "enum": ["float", "base64", None],
        "description": "Numbers, or the bytes of little-endian float32 in base64; absent: numbers.",
    },
    "dimensions": {
        "type": ["integer", "null"],
        "minimum": 1,
        "maximum": MAX_LENGTH,
        "description": "Return the first dimensions only, normalised again; absent: all.",
    },
    "truncate": {
        "type": ["boolean", "null"],
        "description": "Use the beginning of a text that is too long; absent: such a text is an error.",
    },
    "user": {"type": ["string", "null"], "description": IGNORED},
}


def texts_of(reader: Reader) -> Texts:
    """What turns texts into tokens. Raises ApiError for a model that makes no embeddings."""
    try:
        return Texts.of(reader.bundle, reader.tokenizer)
    except BadInput:
        words = "This model makes no embeddings: its bundle was not built with llm_build --ret_postnorm."
        raise invalid(words, "model") from None


def read(reader: Reader, body: Mapping[str, Any]) -> Order:
    """Raises ApiError for a text that cannot be used."""
    given = body["input"]
    several = isinstance(given, list) and not isinstance(given[0], int)
    return order(reader, given if several else [given], body.get("dimensions"), body.get("truncate", False))


def order(reader: Reader, given: Sequence[Any], dimensions: int | None, truncate: bool) -> Order:
    """The order for a list of texts and of token ids. Raises ApiError."""
    texts = texts_of(reader)
    try:
        texts.expect_dimensions(dimensions)
    except BadInput as error:
        raise invalid(f"{error}.", "dimensions") from None
    listed = []
    for number, text in enumerate(given):
        param = f"input[{number}]" if len(given) > 1 else "input"
        try:
            listed.append(Text(number, texts.ids(text, truncate), texts, dimensions))
        except TooLong as error:
            raise invalid(sentence(error), param, "context_length_exceeded") from None
        except BadInput as error:
            raise invalid(sentence(error), param) from None
    return Order(listed, 1, scored=False, stream=False, include_usage=False)


class Reply(WholeReply):
    """The embeddings of one request."""

    def __init__(self, model: str, fingerprint: str, body: Mapping[str, Any], order: Order) -> None:
        self._model = model
        self._encode = _base64 if body.get("encoding_format") == "base64" else numbers

    def whole(self, pieces: Sequence[Piece]) -> bytes:
        data = [
            {"object": "embedding", "index": piece.choice, "embedding": self._encode(piece.vector)}
            for piece in sorted(pieces, key=lambda piece: piece.choice)
        ]
        tokens = sum(piece.prompt for piece in pieces)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return to_json({"object": "list", "data": data, "model": self._model, "usage": usage})


def _base64(vector: Vector) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


ENDPOINT = Endpoint("Embeddings of texts", FIELDS, "Embeddings", read, Reply, streams=False)
