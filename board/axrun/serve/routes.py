"""The routes that generate. The server answers them, and /openapi.json describes them."""

from __future__ import annotations

from axrun.serve import schema
from axrun.serve.answer import CHAT, COMPLETION, in_style
from axrun.serve.embedding import ENDPOINT as EMBEDDINGS
from axrun.serve.endpoint import Endpoint
from axrun.serve.ollama.endpoints import ENDPOINTS as OLLAMA
from axrun.serve.order import Reader
from axrun.serve.responses import fields, reply, request

WRITING: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(
        "Answer a conversation", schema.CHAT, "ChatCompletion", Reader.chat, in_style(CHAT)
    ),
    "/v1/completions": Endpoint(
        "Continue a text", schema.COMPLETION, "Completion", Reader.completion, in_style(COMPLETION)
    ),
    "/v1/embeddings": EMBEDDINGS,
    "/v1/responses": Endpoint("Answer a conversation", fields.FIELDS, "Response", request.read, reply.Response),
    **OLLAMA,
}
