"""/api/embed: https://docs.ollama.com/api/embed"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from axrun.embeddings import numbers
from axrun.serve import embedding
from axrun.serve.answer import to_json
from axrun.serve.endpoint import Endpoint, WholeReply
from axrun.serve.field_kinds import Fields, ignored, optional
from axrun.serve.ollama.fields import LOADING
from axrun.serve.ollama.reply import NANOSECONDS
from axrun.serve.order import Order, Reader
from axrun.serve.writer import Piece

FIELDS: Fields = {
    "input": {
        "description": "The texts.",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "maxItems": embedding.MAX_INPUTS, "items": {"type": "string"}},
        ],
        "title": f"text, or a list of up to {embedding.MAX_INPUTS}",
    },
    "dimensions": embedding.FIELDS["dimensions"],
    "truncate": optional("boolean", "Use the beginning of a text that is too long; absent: true."),
    "options": optional(
        "object",
        "Accepted and ignored.",
        properties={name: ignored("number", "boolean") for name in LOADING},
        additionalProperties=False,
    ),
    "keep_alive": ignored("string", "number"),
}


def read(reader: Reader, body: Mapping[str, Any]) -> Order:
    """Raises ApiError for a text that cannot be used."""
    given = body["input"]
    texts = [given] if isinstance(given, str) else given
    return embedding.order(reader, texts, body.get("dimensions"), body.get("truncate", True))


class Answer(WholeReply):
    """The embeddings of one request."""

    def __init__(self, model: str, fingerprint: str, body: Mapping[str, Any], order: Order) -> None:
        self._model, self._came = model, time.monotonic()

    def whole(self, pieces: Sequence[Piece]) -> bytes:
        """The body of the response."""
        listed = sorted(pieces, key=lambda piece: piece.choice)
        return to_json(
            {
                "model": self._model,
                "embeddings": [numbers(piece.vector) for piece in listed],
                "total_duration": int((time.monotonic() - self._came) * NANOSECONDS),
                "load_duration": 0,
                "prompt_eval_count": sum(piece.prompt for piece in listed),
            }
        )


ENDPOINT = Endpoint("Embeddings of texts", FIELDS, "OllamaEmbeddings", read, Answer, streams=False, error="OllamaError")
