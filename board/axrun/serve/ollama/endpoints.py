"""The routes of Ollama's API that generate."""

from __future__ import annotations

from axrun.serve.endpoint import Endpoint
from axrun.serve.ollama import embed, fields, reply, request

ENDPOINTS: dict[str, Endpoint] = {
    "/api/chat": Endpoint(
        "Answer a conversation",
        fields.CHAT,
        "OllamaChat",
        request.read_chat,
        reply.with_content(reply.chat),
        media=reply.NDJSON,
        error="OllamaError",
    ),
    "/api/generate": Endpoint(
        "Answer a question",
        fields.GENERATE,
        "OllamaGenerate",
        request.read_generate,
        reply.with_content(reply.generate),
        media=reply.NDJSON,
        error="OllamaError",
    ),
    "/api/embed": embed.ENDPOINT,
}
