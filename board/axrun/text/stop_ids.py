"""The stop token ids: those in any file of the checkpoint, and the end-of-turn token of the chat template.

The files of a checkpoint often disagree: a fine-tuned model may keep the generation_config.json of its base model and
end its turns with another token.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from axrun.errors import BadInput
from axrun.text.hf_files import read_json, special_tokens
from axrun.text.template import PROBE, ChatTemplate

TEMPLATE = "chat template"


def find(hf: Path, backend: tokenizers.Tokenizer, template: ChatTemplate | None) -> dict[int, tuple[str, ...]]:
    """All stop ids in rising order, each with the files that name it."""
    named: list[tuple[str, int]] = []
    for name in ("generation_config.json", "config.json"):
        ids = read_json(hf / name).get("eos_token_id")
        listed = ids if isinstance(ids, list) else [ids]
        named += [(name, token) for token in listed if type(token) is int and token >= 0]
    token = backend.token_to_id(special_tokens(hf).get("eos_token", ""))
    named += [] if token is None else [("tokenizer_config.json", token)]
    end = None if template is None else end_of_turn(backend, template)
    named += [] if end is None else [(TEMPLATE, end)]
    return {
        stop: tuple(dict.fromkeys(name for name, token in named if token == stop))
        for stop in sorted({token for _, token in named})
    }


def end_of_turn(backend: tokenizers.Tokenizer, template: ChatTemplate) -> int | None:
    """The special token that the template writes directly after the last assistant message, or None."""
    try:
        asked = [{"role": "user", "content": "question"}, {"role": "assistant", "content": PROBE}]
        prompt = template.render(template.fit(asked), add_generation_prompt=False)
    except BadInput:
        return None
    _, found, after = prompt.rpartition(PROBE)
    after = after.lstrip()
    added = backend.get_added_tokens_decoder()
    ends = [number for number, token in added.items() if token.special and after.startswith(token.content)]
    return max(ends, key=lambda number: len(added[number].content)) if found and ends else None
