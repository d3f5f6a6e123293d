"""Stages `tokenizer` and `template`: compares the runner's tokenizer and chat template with transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from axc import tokenizer_comparison
from axc.doctor.case import REBUILD, Case
from axrun.doctor.bounds import bounded
from axrun.doctor.report import Finding
from axrun.doctor.stages import refused
from axrun.errors import BadInput
from axrun.text import stop_ids
from axrun.text.hf_files import SPECIAL, special_tokens, template_file
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer

SECTIONS = {  # sections of tokenizer.json and their names in findings
    "added_tokens": "added tokens",
    "normalizer": "normalizer",
    "pre_tokenizer": "pre-tokenizer",
    "model": "model (vocabulary and merges)",
    "post_processor": "post-processor (bos and eos around a text)",
    "decoder": "decoder",
}
MODEL = ("vocab", "merges")  # compared if the file is not a copy of the checkpoint's
SHOWN = 60
COPY = "Copy hf/ of the bundle again, or build it again with `axc llm_build`."


def tokenizer(case: Case) -> str | Finding:
    """Compares encoding and decoding."""
    file = tokenizer_file(case.bundle.hf)
    try:
        ours, theirs = case.tokenizer, case.theirs
    except BadInput as failure:
        held = template_file(case.bundle.hf) if "chat template" in str(failure) else None
        part = "chat template" if held else "cannot be read"
        return refused("tokenizer", failure, part, f"hf/{held[0]}" if held else "")
    if ours is None or theirs is None:
        if ours is None and theirs is None:
            return "neither the checkpoint nor the bundle has a tokenizer: the model takes token ids"
        having, lacking = ("the checkpoint", "the bundle") if ours is None else ("the bundle", "the checkpoint")
        return Finding(
            "tokenizer", "tokenizer", file, f"a tokenizer in {lacking}, as in {having}", "none",
            "a file of hf/ was not copied, or belongs to another model", COPY,
        )  # fmt: skip
    difference = next(_differences(ours, theirs), None)
    if difference is not None:
        part, expected, seen = difference
        cause = _why(case, file, theirs)
        section = next((called for key, called in SECTIONS.items() if f"{called} " in cause), "")
        return Finding("tokenizer", f"{section + ', ' if section else ''}{part}", file, expected, seen, cause, COPY)
    changed = _other_model(case, file, theirs)
    if changed is not None:
        return changed
    texts = len(tokenizer_comparison.probe(ours, theirs))
    return f"{len(ours.vocabulary)} tokens, {len(ours.added_tokens)} of them added; {texts} texts agree"


def tokenizer_file(hf: Path) -> str:
    return "hf/tokenizer.json" if (hf / "tokenizer.json").is_file() else "hf/vocab.json"


def _differences(ours: Tokenizer, theirs: Any) -> Iterator[tuple[str, str, str]]:
    """Differences as (what, transformers' value, the bundle's value)."""
    added, wanted = (
        tokenizer_comparison.described(ours.added_tokens),
        tokenizer_comparison.described(theirs.added_tokens_decoder),
    )
    for number in sorted({*added, *wanted}):
        if added.get(number) != wanted.get(number):
            yield f"added token {number}", _token(wanted.get(number)), _token(added.get(number))
    for line in tokenizer_comparison.tokenizer_differences(ours, theirs):
        text, _, rest = line.partition(" decodes to " if " decodes to " in line else " is ")
        seen, _, expected = rest.partition(", and ")
        verb = "decoding" if " decodes to " in line else "text"
        yield f"{verb} {text}", expected.removeprefix("to ").removesuffix(" with transformers"), seen


def _token(token: Any) -> str:
    if token is None:
        return "no such token"
    content, flags = token
    on = ", ".join(flag for flag, value in flags.items() if value)
    return f"{content!r:.40}" + (f" ({on})" if on else "")


def _why(case: Case, file: str, theirs: Any) -> str:
    """The sections of tokenizer.json that differ, and the one whose replacement alone corrects the ids."""
    path = case.bundle.path / file
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None or not path.name.endswith("tokenizer.json"):
        return "the file belongs to another tokenizer, or to another version of it"
    ours, wanted = json.loads(path.read_text("utf-8")), json.loads(backend.to_str())
    differing = [key for key in SECTIONS if ours.get(key) != wanted.get(key)]
    if not differing:
        return "the files are equal: another version of the package tokenizers reads them differently"
    for key in differing:
        if _mended_by(ours, wanted, key, theirs):
            return f"the {SECTIONS[key]} {_differs(key)} from the checkpoint's{_detail(key, ours, wanted)}"
    listed = ", ".join(SECTIONS[key] for key in differing)
    whole = "; the file belongs to another model" if len(differing) > 2 else ""
    return f"the {listed} differ from the checkpoint's{_detail(differing[0], ours, wanted)}{whole}"


def _differs(section: str) -> str:
    return "differ" if section == "added_tokens" else "differs"


def _other_model(case: Case, file: str, theirs: Any) -> Finding | None:
    """Compares the sections of tokenizer.json as data, because test texts do not cover rare merges and rules.

    If the bundle has a copy of the checkpoint's file, all sections are compared; else only vocabulary and merges.
    """
    backend, path = getattr(theirs, "backend_tokenizer", None), case.bundle.path / file
    text = case.bundle.manifest.get("text")
    mended = isinstance(text, dict) and path.name in (text.get("mended") or {})
    if backend is None or path.name != "tokenizer.json":
        return None
    original = case.folder / path.name
    copied = original.is_file() and not mended
    ours = json.loads(path.read_text("utf-8"))
    wanted = json.loads(original.read_text("utf-8-sig") if copied else backend.to_str())
    if not copied:
        ours, wanted = ({"model": {key: values["model"].get(key) for key in MODEL}} for values in (ours, wanted))
    for key in SECTIONS if copied else ("model",):
        detail = _detail(key, ours, wanted) if ours.get(key) != wanted.get(key) else ""
        if not detail:
            continue
        seen, _, expected = detail.removeprefix(": ").partition(", expected ")
        cause = f"the {SECTIONS[key]} {_differs(key)} from the checkpoint's"
        return Finding("tokenizer", SECTIONS[key], file, expected, seen, cause, COPY)
    return None


def _mended_by(ours: dict[str, Any], wanted: dict[str, Any], key: str, theirs: Any) -> bool:
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps({**ours, key: wanted.get(key)}))
    except Exception:  # the package raises nothing more particular
        return False
    backend.no_truncation()
    backend.no_padding()
    return next(_differences(Tokenizer(backend, {}), theirs), None) is None


def _detail(key: str, ours: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first difference within a section."""
    one, other = ours.get(key), wanted.get(key)
    if key == "model" and isinstance(one, dict) and isinstance(other, dict):
        vocabulary, right = one.get("vocab"), other.get("vocab")
        if isinstance(vocabulary, dict) and isinstance(right, dict) and vocabulary != right:
            token = next(token for token in {**right, **vocabulary} if vocabulary.get(token) != right.get(token))
            return f": token {token!r:.40} is {vocabulary.get(token)}, expected {right.get(token)}"
        merges, right_merges = one.get("merges") or [], other.get("merges") or []
        if len(merges) != len(right_merges):
            return f": it has {len(merges)} merges, expected {len(right_merges)}"
        at = next(
            (at for at, (a, b) in enumerate(zip(merges, right_merges, strict=True)) if _merge(a) != _merge(b)), None
        )
        if at is not None:
            return f": merge {at} is {_merge(merges[at])!r}, expected merge {at} {_merge(right_merges[at])!r}"
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        return f": {names[0]} is {one.get(names[0])!r:.40}, expected {other.get(names[0])!r:.40}" if names else ""
    if key == "added_tokens":
        one, other = ([_entry(entry) for entry in each or []] for each in (one, other))
        return f": {_first(one, other)}, expected {_first(other, one)}" if one != other else ""
    return f": {_first([one], [other])}, expected {_first([other], [one])}"


def _entry(token: Any) -> Any:
    """An added token without flags that have the usual value."""
    return {key: value for key, value in token.items() if value is not False} if isinstance(token, dict) else token


def _first(ours: list[Any], theirs: list[Any]) -> str:
    """An excerpt of `ours` around the first difference from `theirs`."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if at >= len(ours):
        return "nothing more"
    one, other = json.dumps(ours[at]), json.dumps(theirs[at]) if at < len(theirs) else ""
    start = max(_common(one, other) - SHOWN // 2, 0) if len(one) > SHOWN else 0
    return "..." * bool(start) + _short(one[start:])


def _merge(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(map(str, merge))


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def template(case: Case) -> str | Finding:
    """Compares rendered chats and stop ids."""
    ours, theirs = case.tokenizer, case.theirs
    if ours is None or theirs is None:
        return "no tokenizer, so no chat template"
    hf = case.bundle.hf
    found = template_file(hf)
    theirs_in = template_file(case.folder)
    named = found or theirs_in
    file = f"hf/{named[0]}" if named else "hf/tokenizer_config.json"
    source = theirs.chat_template
    source = source.get("default") if isinstance(source, dict) else source
    if (found is None) != (source is None):
        having, lacking = ("the checkpoint", "the bundle") if found is None else ("the bundle", "the checkpoint")
        return Finding(
            "template", "chat template", file, f"a chat template in {lacking}, as in {having}",
            "none", "a file of hf/ was not copied, or belongs to another model", COPY,
        )  # fmt: skip
    try:
        with bounded("the chat template"):
            rendered = ChatTemplate.find(hf)
            difference = None
            if rendered is not None and source is not None:
                difference = next(tokenizer_comparison.template_differences(rendered, theirs, source), None)
    except BadInput as failure:
        return refused("template", failure, "chat template", file)
    if difference is not None and source is not None:
        return _template_finding(case, file, found[1] if found else "", source, difference)
    if found is not None and source is not None and found[1] != source:
        at = _common(found[1], source)
        parts = [repr(each[at : at + SHOWN // 2]) for each in (found[1], source)]
        difference = f"chat template, its text becomes {parts[0]} at character {at}, and {parts[1]}"
        return _template_finding(case, file, found[1], source, difference)
    special = _special(case, theirs, source or "")
    return special or _stops(case, ours, theirs, rendered) or _summary(ours, source)


def _summary(ours: Tokenizer, source: str | None) -> str:
    chats = (
        f"{2 * len(tokenizer_comparison.CONVERSATIONS)} conversations render equally" if source else "no chat template"
    )
    return f"{chats}; stop ids: {', '.join(map(str, sorted(ours.stop_ids))) or 'none'}"


def _template_finding(case: Case, file: str, ours: str, theirs: str, difference: str) -> Finding:
    chat, _, rest = difference.partition(" becomes ")
    seen, _, expected = rest.partition(", and ")
    expected = expected.removesuffix(" with transformers")
    if ours == theirs:
        wrong = [
            name
            for name, token in special_tokens(case.bundle.hf).items()
            if case.theirs.special_tokens_map.get(name) != token
        ]
        cause = (
            f"the template is the checkpoint's, but {', '.join(wrong)} differs" if wrong else
            "the template is the checkpoint's, but the runner renders it differently: its jinja2 or its functions"
        )  # fmt: skip
    else:
        at = _common(ours, theirs)
        line = ours[:at].count("\n") + 1
        cause = (
            f"the template differs from the checkpoint's from line {line} on: {ours[at : at + 30]!r}, "
            f"expected {theirs[at : at + 30]!r}"
        )
    return Finding("template", chat, file, expected, seen, cause, COPY)


def _common(one: str, other: str) -> int:
    """The length of the common prefix."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _special(case: Case, theirs: Any, source: str) -> Finding | None:
    """Compares the special tokens that the template or the stop condition uses."""
    ours = special_tokens(case.bundle.hf)
    wanted = {name: token for name, token in theirs.special_tokens_map.items() if name in SPECIAL}
    for name in sorted({*ours, *wanted}):
        if ours.get(name) != wanted.get(name) and (name == "eos_token" or name in source):
            return Finding(
                "template", name, "hf/tokenizer_config.json", f"{wanted.get(name)!r}", f"{ours.get(name)!r}",
                f"{name} differs from the checkpoint's", COPY,
            )  # fmt: skip
    return None


def _stops(case: Case, ours: Tokenizer, theirs: Any, rendered: ChatTemplate | None) -> Finding | None:
    """Compares the stop ids with those named by the checkpoint's files and template."""
    wanted = dict[int, str]()
    for named, numbers in _named_stops(case, theirs, rendered):
        wanted.update({number: wanted.get(number, named) for number in numbers if number < case.bundle.vocab_size})
    seen = {number for number in ours.stop_ids if number < case.bundle.vocab_size}
    if seen == set(wanted):
        recorded = case.bundle.manifest.get("text")
        listed = recorded.get("stop_ids") if isinstance(recorded, dict) else None
        if isinstance(listed, dict) and {int(number) for number in listed if number.isdigit()} != seen:
            return Finding(
                "template", "stop ids of the manifest", "manifest.json", f"stop ids {sorted(seen)}",
                f"{', '.join(listed) or 'none'}", "the manifest was edited, or belongs to another bundle", REBUILD,
            )  # fmt: skip
        return None
    lacking, extra = sorted(set(wanted) - seen), sorted(seen - set(wanted))
    number = (lacking or extra)[0]
    name = wanted[number] if lacking else ours.stop_sources[number][0]
    file = f"hf/{name}" if name.endswith(".json") else "hf/generation_config.json"
    cause = (
        f"{name} of the checkpoint lists {number}, that of the bundle does not: answers do not end" if lacking else
        f"{name} of the bundle lists {number}, no file of the checkpoint does: answers end early"
    )  # fmt: skip
    return Finding("template", f"stop id {number}", file, f"stop ids {sorted(wanted)}", f"{sorted(seen)}", cause, COPY)


def _named_stops(case: Case, theirs: Any, rendered: ChatTemplate | None) -> Iterator[tuple[str, list[int]]]:
    """(source, ids) of the checkpoint's stop ids, read with transformers."""
    import transformers

    folder = case.folder
    readers: tuple[tuple[str, Callable[[], Any]], ...] = (
        (
            "generation_config.json",
            lambda: transformers.GenerationConfig.from_pretrained(folder, local_files_only=True),
        ),
        ("config.json", lambda: transformers.PreTrainedConfig.get_config_dict(folder, local_files_only=True)[0]),
    )
    for name, read in readers:
        if not (folder / name).is_file():
            continue
        values = read()
        ids = values.get("eos_token_id") if isinstance(values, dict) else values.eos_token_id
        listed = ids if isinstance(ids, list) else [ids]
        yield name, [token for token in listed if type(token) is int and token >= 0]
    if theirs.eos_token_id is not None:
        yield "tokenizer_config.json", [theirs.eos_token_id]
    backend = getattr(theirs, "backend_tokenizer", None)
    if rendered is not None and backend is not None:
        end = stop_ids.end_of_turn(backend, rendered)
        if end is not None:
            yield "chat template", [end]


__all__ = ["template", "tokenizer"]
