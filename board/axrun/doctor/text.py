"""The stages `tokenizer` and `template`: compares how the runner and transformers read hf/."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axrun.doctor.bounds import bounded
from axrun.doctor.context import Context
from axrun.doctor.report import Finding
from axrun.doctor.spelling import different, vocabulary
from axrun.doctor.stages import NotExamined, refused
from axrun.doctor.stops import recorded, stops
from axrun.errors import Failure
from axrun.text.hf_files import template_file
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer

TOKENIZER, TEMPLATE = "tokenizer", "template"
SECTIONS = ("added_tokens", "normalizer", "pre_tokenizer", "model", "post_processor", "decoder")  # of tokenizer.json
COPY = "Copy the bundle again, or build it again from this checkpoint."


def tokenizer(context: Context) -> str | Finding:
    """Compares encoding and decoding of texts with the checkpoint's own tokenizer."""
    hf = context.bundle.hf
    try:
        with bounded("the chat template"):
            ours = Tokenizer.find(hf)  # also renders the chat template to find its end-of-turn token
    except Failure as failure:
        named = template_file(hf) if "chat template" in str(failure) else None
        part = "the chat template" if named else "the tokenizer's files"
        return refused(TOKENIZER, failure, part, f"hf/{named[0]}" if named else "")
    texts = _listed(context.figures.about["text"], "texts", ("text", "ids", "decoded"))
    if ours is None:
        if texts:
            return _finding(context, "no tokenizer", "the checkpoint's", "none in hf/", "the files in hf/ were removed")
        raise NotExamined("the bundle has no tokenizer")
    if not texts:
        raise NotExamined("the figures hold no texts: transformers found no tokenizer in the checkpoint")
    for entry in texts:
        try:
            ids = ours.encode(entry["text"])
        except Failure as failure:
            return refused(TOKENIZER, failure, f"the text {entry['text'][:30]!a}", _file(context))
        if ids != entry["ids"]:
            part = f"the text {entry['text'][:30]!a}"
            return _finding(context, part, _ids(entry["ids"], ids), _ids(ids, entry["ids"]), _why(ids, entry["ids"]))
        if (text := ours.decode(ids)) != entry["decoded"]:
            part = f"the ids of {entry['text'][:30]!a} as text"
            cause = "a different decoder in tokenizer.json: spaces or parts of characters are joined differently"
            return _finding(context, part, f"{entry['decoded'][:50]!a}", f"{text[:50]!a}", cause)
    listed = context.figures.about["text"].get("vocabulary")
    if isinstance(listed, list) and (other := different(listed, vocabulary(ours.backend))):
        part, expected, seen = other
        return _finding(context, part, expected, seen, "tokenizer.json was edited, or belongs to another model")
    if part := _other_section(context):
        cause = "edited, or from another model, although the test texts give the same ids"
        return _finding(context, part, "the checkpoint's checksum", "a different one", cause)
    return f"{len(texts)} texts encode and decode as in transformers"


def sections(file: Path) -> dict[str, int]:
    """CRC-32 of each section of a tokenizer.json. Raises OSError and ValueError."""
    values = json.loads(file.read_text("utf-8-sig"))
    return {name: zlib.crc32(json.dumps(values.get(name), sort_keys=True).encode()) for name in SECTIONS}


def _other_section(context: Context) -> str:
    """The section of tokenizer.json that differs from the checkpoint's; empty if equal or not comparable."""
    listed = context.figures.about["text"].get("sections")
    file, text = context.bundle.hf / "tokenizer.json", context.bundle.manifest.get("text")
    mended = text.get("mended") if isinstance(text, dict) else None
    if not isinstance(listed, dict) or not file.is_file() or (isinstance(mended, dict) and file.name in mended):
        return ""
    try:
        seen = sections(file)
    except (OSError, ValueError, RecursionError):
        return ""
    return next((f"{name} of tokenizer.json" for name in SECTIONS if listed.get(name) != seen[name]), "")


def template(context: Context) -> str | Finding:
    """Compares rendered conversations with the checkpoint's own template, and checks the stop ids."""
    hf, name = context.bundle.hf, "hf/tokenizer_config.json"  # its usual place
    try:
        file = template_file(hf)
        name = f"hf/{file[0]}" if file else name
        with bounded("the chat template"):
            ours = ChatTemplate.find(hf)
            found = stops(context.bundle)
    except Failure as failure:
        return refused(TEMPLATE, failure, "the chat template", name)
    if found:
        return found
    about = context.figures.about["text"]
    if found := recorded(context.bundle, about.get("stop_ids")):
        return found
    if not isinstance(about.get("template"), bool):
        raise NotExamined("the figures hold no conversations: transformers found no tokenizer in the checkpoint")
    if about["template"] != (ours is not None):
        having, lacking = ("none", "a template") if ours else ("a template", "none")
        cause = "the file belongs to another model, or was not copied"
        return Finding(TEMPLATE, "the chat template", name, having.replace("none", "no template"), lacking, cause, COPY)
    if ours is None:
        return "neither the checkpoint nor the bundle has a chat template"
    conversations = _listed(about, "conversations", ("name", "messages", "given", "prompt"))
    if not conversations:
        raise NotExamined("the template writes the date, so its prompts change daily and none were stored")
    for entry in conversations:
        prompt = None
        try:
            with bounded("the chat template"):
                prompt = _rendered(ours, entry)
        except Failure as failure:
            return refused(TEMPLATE, failure, f"the conversation: {entry['name'][:60]}", name)
        if prompt != entry["prompt"]:
            cause = "the template belongs to another model, or was edited"
            seen, wanted = _at_difference(prompt, entry["prompt"]), _at_difference(entry["prompt"], prompt)
            return Finding(TEMPLATE, f"the conversation: {entry['name'][:60]}", name, wanted, seen, cause, COPY)
    known = about.get("template_sum")
    if file and isinstance(known, int) and zlib.crc32(file[1].encode("utf-8", "surrogatepass")) != known:
        cause = "the template differs from the checkpoint's, although the test conversations agree"
        return Finding(TEMPLATE, "template text", name, "the checkpoint's checksum", "a different one", cause, COPY)
    return f"{len(conversations)} conversations rendered as in transformers"


def _rendered(template: ChatTemplate, entry: Mapping[str, Any]) -> str | None:
    """The rendered prompt; None if the template refuses the messages."""
    try:
        return template.render(entry["messages"], True, **entry["given"])
    except Failure:
        return None


def _listed(about: Mapping[str, Any], name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Valid entries of a list in the figures; others are skipped."""
    listed = about.get(name)
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    kinds: dict[str, Any] = {
        "text": str,
        "ids": list,
        "decoded": str,
        "name": str,
        "messages": list,
        "given": dict,
        "prompt": (str, type(None)),
    }
    return [entry for entry in entries if all(isinstance(entry.get(key, 0), kinds[key]) for key in keys)]


def _why(ours: Sequence[int], theirs: Sequence[Any]) -> str:
    if len(ours) == len(theirs) and len({a - b for a, b in zip(ours, theirs) if isinstance(b, int)}) == 1:
        return f"all ids are off by {ours[0] - theirs[0]:+d}: the vocabulary is shifted, e.g. by other added tokens"
    if list(ours) == list(theirs[1:]) or list(ours[1:]) == list(theirs):
        return "a special token at the start differs: a different post-processor in tokenizer.json"
    return "the tokenizer belongs to another model, or one of its files was edited"


def _file(context: Context) -> str:
    for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json"):
        if (context.bundle.hf / name).is_file():
            return f"hf/{name}"
    return "hf/"


def _finding(context: Context, part: str, expected: str, seen: str, cause: str) -> Finding:
    return Finding(TOKENIZER, part, _file(context), expected, seen, cause, COPY)


def _ids(ids: Sequence[Any], other: Sequence[Any]) -> str:
    """A few ids from the first different one on."""
    at = next((i for i, (a, b) in enumerate(zip(ids, other)) if a != b), min(len(ids), len(other)))
    return f"{list(ids[at : at + 6])!s:.80} from token {at} on, of {len(ids)}"


def _at_difference(text: str | None, other: str | None) -> str:
    if text is None:
        return "the template refuses it"
    pairs = enumerate(zip(text, other or ""))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(other or "")))
    return f"{'...' if at > 20 else ''}{text[max(at - 20, 0) : at + 40]!a}"
