"""python -m ci.nightly.probe TOKENIZER OUT: test texts and conversations with the token ids that transformers gives.

TOKENIZER is a checkpoint, or the hf folder of a bundle. The board tokenizes the same texts (tests/hil/test_text.py). A
wrong tokenizer or chat template changes the ids, which no accuracy figure would show.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axrun.errors import BadInput, Failure
from ci.device import commands, strict_json

SCHEMA = 1
AGAIN = f"Make it: {commands.python('ci.nightly.probe', 'CHECKPOINT')}"
VARIABLES = {"date_string": "01 Jan 2025"}  # a fixed date, for templates that print one
TEXTS = (
    "1+1=",
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a\ttab,\r\nline ends\n\n\nand trailing ones  ",
    "12 345.678e-9 0x1F 2024-02-29 99999999999999999999",
    "don't DON'T can't we'll I'd you're they've O'Neill",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    '{"key": [1, 2.5, null, true], "text": "\\u00e9\\n"}',
    "naïve café Ångström ﬁ ½ e\u0301 a\u030a",
    "中文分词没有空格。日本語のテキスト 한국어 문장",
    "Привет, мир! مرحبا بالعالم שלום नमस्ते ไทย",
    "👩‍👩‍👧‍👦 🇩🇪 ✈️ \U0001f9d1\U0001f3fd‍\U0001f680",
    "\u200b\ufeff\u00a0\u2028",
    "<|im_start|>user\nhi<|im_end|> <s> </s> <|endoftext|> [INST]",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa===================-----------",
)
CONVERSATIONS = (
    ({"role": "user", "content": "1+1="},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say hi,\nthen  stop. "}),
    (
        {"role": "user", "content": "2+2="},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "and 中文 <|im_end|>?"},
    ),
)

Probe = dict[str, Any]


def make(folder: Path) -> Probe:
    """Texts and conversations with their ids, None if the template refuses one. Raises BadInput without a tokenizer."""
    import transformers

    transformers.logging.set_verbosity_error()
    auto: Any = transformers.AutoTokenizer
    try:
        tokenizer = auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"transformers cannot load a tokenizer from {folder}: {str(error).splitlines()[0][:200]}"
        ) from None
    templated = getattr(tokenizer, "chat_template", None) is not None
    return {
        "schema": SCHEMA,
        "tools": {"transformers": transformers.__version__},
        "variables": VARIABLES,
        "texts": [{"text": text, "ids": list(tokenizer(text)["input_ids"])} for text in TEXTS],
        "conversations": [
            {"messages": list(messages), "ids": _ids(tokenizer, messages)} for messages in CONVERSATIONS if templated
        ],
    }


def _ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int] | None:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **VARIABLES)
    except TemplateError:
        return None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def read(file: Path) -> Probe:
    """Raises BadInput for a missing or invalid probe."""
    try:
        found = strict_json.read(file)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {file}: {error}\n{AGAIN} {file}") from None
    if found.get("schema") != SCHEMA:
        raise BadInput(f"{file} is not a tokenizer probe\n{AGAIN} {file}")
    return found


def difference(probe: Probe, told: Any) -> str:
    """The first text or conversation with other ids, in words; empty if all are equal."""
    for what, key in (("texts", "text"), ("conversations", "messages")):
        expected = probe[what]
        seen = told.get(what) if isinstance(told, dict) else None
        if not isinstance(seen, list) or len(seen) != len(expected):
            return f"the board tokenized {len(seen) if isinstance(seen, list) else 0} {what}, expected {len(expected)}"
        for entry, ids in zip(expected, seen, strict=True):
            if ids != entry["ids"]:
                text = entry[key] if key == "text" else entry[key][-1]["content"]
                by = "tokenizer" if key == "text" else "chat template"
                return f"its {by} turns {text[:40]!a} into {_some(ids)}, the checkpoint's into {_some(entry['ids'])}"
    return ""


def _some(ids: Any) -> str:
    if not isinstance(ids, list):
        return "refused" if ids is None else f"{ids!a:.60}"
    return f"{len(ids)} tokens {ids[:8]}" + (" ..." if len(ids) > 8 else "")


def main(argv: Sequence[str]) -> int:
    folder, out = map(Path, argv)
    try:
        probe = make(folder)
    except Failure as failure:
        print(f"error: {failure}")
        return failure.exit_code
    out.write_text(json.dumps(probe, ensure_ascii=True, indent=1) + "\n", "utf-8")
    print(f"{out}: {len(probe['texts'])} texts and {len(probe['conversations'])} conversations, by {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
