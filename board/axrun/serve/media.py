"""Message parts for other models (images, audio, files), each refused by name."""

from __future__ import annotations

from typing import Any

from axrun.serve.errors import invalid

# https://platform.openai.com/docs/api-reference/chat/create, plus types of other servers and of the Responses API
KINDS = {
    "image_url": "an image",
    "image": "an image",
    "input_image": "an image",
    "image_file": "an image",
    "input_audio": "audio",
    "audio": "audio",
    "audio_url": "audio",
    "video_url": "a video",
    "video": "a video",
    "input_video": "a video",
    "file": "a file",
    "input_file": "a file",
    "document": "a file",
}


def refuse_media(body: Any) -> None:
    """Raises ApiError for the first message part that is not text. The body has not been validated yet."""
    for field, name in (("messages", "message"), ("input", "item")):
        for i, message in enumerate(_list(body, field)):
            for j, part in enumerate(_list(message, "content")):
                kind = part.get("type") if isinstance(part, dict) else None
                if isinstance(kind, str) and kind in KINDS:
                    raise invalid(
                        f"This model reads text only: content part {j + 1} of {name} {i + 1} is {KINDS[kind]}.",
                        f"{field}[{i}].content[{j}]",
                        "unsupported_content",
                    )


def _list(value: Any, key: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []
