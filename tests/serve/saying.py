"""Checkpoints that answer with fixed texts, selected by the last character of the question.

Each token determines the next one: the embedding is one-hot, the layer adds nothing, and the head is the transition
table. A text is split into pieces, each of which is a separate token.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = "<|end|>"
PIECE = 3  # minimum bytes of a piece
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# A prompt that ends with <think> is answered by the text of ">".
THINKING = (
    "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content }}{% endfor %}"
    "{% if enable_thinking %}{{ '<think>' }}{% endif %}{{ '</think>'[:0] }}"
)
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
FENCES = """Before
```python title="a.py"
print("```")
```
~~~
tildes
~~~
1. In a list:

   ```sh
   make

   make test
   ```
- ````markdown
  ```
  inside
  ```
  ````

After the list:

    indented

```unfinished
to the end"""
FENCED = [
    ("python", 'print("```")'),
    ("", "tildes"),
    ("sh", "make\n\nmake test"),
    ("markdown", "```\ninside\n```"),
    ("", "indented"),
    ("unfinished", "to the end"),
]
MARKDOWN = """# Title

Some **bold**, *italic*, ~~struck~~ and `code`; [a link](https://example.org/a?b=1) and https://example.org/bare.
One line,
another.

1. first
2. second
   - nested

| left | right<br>below |
|:--|--:|
| 1 | 2 |

> quoted

![picture](https://example.org/picture.png) [later][1]

[1]: https://example.org/later
"""
NASTY = """<script>window.pwned = 1</script>
<img src=x onerror="window.pwned = 2"> <svg/onload=window.pwned=3> <a href="javascript:window.pwned=4">a</a>

<iframe src="https://example.org/"></iframe><style>body { display: none }</style><form action=/x><input autofocus
onfocus=window.pwned=5></form>

<div style="position: fixed; inset: 0" id=log>over all</div>

[a](javascript:window.pwned=6) [b](JaVaScRiPt&#58;window.pwned=7) [c](data:text/html,<script>window.pwned=8</script>)
<javascript:window.pwned=9> [d](vbscript:x) [e](/metrics) [f](//example.org/x) ![g](data:image/svg+xml,<svg>)
![h](https://example.org/track.png) [i](https://example.org/"onmouseover="window.pwned=10) [j]( java&#10;script:x)

```"><img/src=x/onerror=window.pwned=11>
</code></pre><script>window.pwned = 12</script>
```

| <img src=x onerror=window.pwned=13> | `</td><script>window.pwned=14</script>` |
|--|--|
| <math><mtext><table><mglyph><style><img src=x onerror=window.pwned=15> | <noscript><p title="</noscript><img src=x> |
"""
LONG = " ".join(f"The line {number} of a long answer." for number in range(1, 61))
TEXTS = {
    "s": "A short answer.",
    "m": MARKDOWN,
    "f": FENCES,
    "x": NASTY,
    "l": LONG,
    "c": 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome, Italy"}}\n</tool_call>',
    "j": '{"name": "Ada", "age": 36, "mood": "good"}',
    "t": "<think>\nHm, so.\n\nWell.\n</think>\n\nIt is two.",
    ">": "Oh, easy!\n</think>\n\nIt is four.",
    "u": '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
    "e": "And on it goes: word by word, line by line;\n\n",
}

# Byte-level BPE spells these bytes as themselves, and the others as characters from U+0100 on.
BYTES = (*PRINTABLE, *(byte for byte in range(256) if byte not in PRINTABLE))
ALPHABET = dict(zip(BYTES, sorted(pre_tokenizers.ByteLevel.alphabet()), strict=True))


def write(folder: Path, texts: Mapping[str, str], endless: str = "", context: int = 4096) -> Path:
    """A checkpoint that answers texts[last character of the question]; texts in `endless` repeat for ever.

    A question that ends in "?" is answered by a random capital letter and a random digit, uniformly.
    """
    folder.mkdir(parents=True)
    vocab = {END: 0, **{char: 1 + i for i, char in enumerate(ALPHABET.values())}}
    follows = {vocab["?"]: [vocab[char] for char in string.ascii_uppercase]}
    follows.update({vocab[char]: [vocab[digit] for digit in string.digits] for char in string.ascii_uppercase})
    for last, text in texts.items():
        said = []
        for piece in pieces("".join(ALPHABET[byte] for byte in text.encode()), vocab):
            said.append(vocab.setdefault(piece, len(vocab)))
        after = [*said[1:], said[0] if last in endless else vocab[END]]
        follows.update({vocab[last]: said[:1], **{token: [then] for token, then in zip(said, after, strict=True)}})
    size = -(-len(vocab) // 8) * 8
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size, "intermediate_size": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": size // 8, "num_key_value_heads": 1, "head_dim": 8},
        **{"vocab_size": size, "max_position_embeddings": context, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
        **{"tie_word_embeddings": False, "eos_token_id": 0, "bos_token_id": 0, "torch_dtype": "float32"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(follows, size), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(vocab).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def pieces(text: str, taken: Mapping[str, int]) -> list[str]:
    """Splits a text into distinct pieces that are not tokens yet."""
    cut: list[str] = []
    at = 0
    while at < len(text):
        end = at + PIECE
        while end < len(text) and (text[at:end] in taken or text[at:end] in cut):
            end += 1
        cut.append(text[at:end])
        at = end
    while cut[-1] in taken or cut[-1] in cut[:-1]:
        cut[-2:] = ["".join(cut[-2:])]
    return cut


def tokenizer(vocab: Mapping[str, int]) -> Tokenizer:
    made = Tokenizer(models.BPE(dict(vocab), []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return made


def weights(follows: Mapping[int, list[int]], size: int) -> dict[str, np.ndarray]:
    head = np.zeros((size, size), np.float32)
    for token in range(size):
        head[follows.get(token, [0]), token] = 4
    layer = "model.layers.0."
    none = {
        **{f"self_attn.{name}_proj": (rows, size) for name, rows in (("q", size), ("k", 8), ("v", 8), ("o", size))},
        **{"mlp.gate_proj": (8, size), "mlp.up_proj": (8, size), "mlp.down_proj": (size, 8)},
    }
    norms = (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm")
    return {
        "model.embed_tokens.weight": np.eye(size, dtype=np.float32),
        "lm_head.weight": head,
        **{f"{layer}{name}.weight": np.zeros(shape, np.float32) for name, shape in none.items()},
        **{f"{name}.weight": np.ones(size, np.float32) for name in norms},
    }
