"""Runs on the board with the release's packages: tokenizes a probe's texts and conversations, prints the token ids.

Arguments: the bundle, and the probe without its ids as JSON.
"""

import json
import sys
from pathlib import Path
from typing import Optional

from axrun.errors import Failure
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer

hf, probe = Path(sys.argv[1]) / "hf", json.loads(sys.argv[2])
tokenizer, template = Tokenizer.open(hf), ChatTemplate.find(hf)


def templated(messages: list[dict[str, str]]) -> Optional[list[int]]:  # noqa: UP045  (Python 3.9)
    """None if the template raises an error."""
    assert template is not None, "the bundle on the board has no chat template"
    try:
        text = template.render(messages, True, **probe["variables"])
    except Failure:
        return None
    return tokenizer.encode(text, special=False)


texts = [tokenizer.encode(text) for text in probe["texts"]]
print(json.dumps({"texts": texts, "conversations": [templated(entry) for entry in probe["conversations"]]}))
