"""A bundle's hf/ folder: the checkpoint's text files, verified to load in the runner like in transformers.

The reference is transformers' AutoTokenizer, which reads the checkpoint by its own rules. If the runner would differ,
the bundle's files are repaired: tokenizer.json is replaced by transformers' own tokenizer, and its special tokens and
template are written to the files that the runner reads. Differences that cannot be repaired are refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers

from axc import gguf_reading, tokenizer_comparison
from axc.checkpoints.folder import refuse_lfs_pointer
from axrun.errors import BadInput
from axrun.text import hf_files
from axrun.text.hf_files import SPECIAL, special_tokens, template_source
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer

# copied into hf/ if the checkpoint has them
HF_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
# files that transformers may read but the runner does not
OTHER_FILES = ("tekken.json", "tiktoken.model", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
OTHER_TEMPLATES = "additional_chat_templates/*.jinja"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", *OTHER_FILES)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
INSTALL = "Run `make setup`, or: pip install transformers sentencepiece tiktoken"
LISTED = 4  # named tokens or differences


@dataclass
class HfFolder:
    """The content of the folder. `stop_ids` maps each id to its sources; `tokenizer` is None without a tokenizer.

    `mended` describes the changes to each repaired file, `mended_by` names the library and version that repaired it.
    `compared` is False if transformers was not available for the comparison.
    """

    tokenizer: Tokenizer | None = None
    template: ChatTemplate | None = None
    stop_ids: dict[int, tuple[str, ...]] = field(default_factory=dict)
    mended: dict[str, str] = field(default_factory=dict)
    mended_by: str = ""
    compared: bool = True
    remarks: list[str] = field(default_factory=list)

    def manifest(self) -> dict[str, Any]:
        """Its entry in the manifest."""
        return {
            "stop_ids": {str(number): list(sources) for number, sources in self.stop_ids.items()},
            **({"mended": self.mended} if self.mended else {}),
            **({"mended_by": self.mended_by} if self.mended_by else {}),
            **({} if self.compared else {"compared": False}),
        }


def input_files(checkpoint: Path) -> tuple[Path, ...]:
    """The checkpoint files that the folder is made from."""
    named = [checkpoint / name for name in (*HF_FILES, *OTHER_FILES)]
    return tuple(path for path in (*named, *sorted(checkpoint.glob(OTHER_TEMPLATES))) if path.is_file())


def tokenizer_bytes(checkpoint: Path) -> int:
    """Bytes of the files that a tokenizer is made from."""
    return sum((checkpoint / name).stat().st_size for name in TOKENIZERS if (checkpoint / name).is_file())


def write(
    checkpoint: Path, hf: Path, vocab_size: int, model_config: Path | None = None, gguf: Path | None = None
) -> HfFolder:
    """Fills `hf` and verifies it; `gguf` is the file that the checkpoint's folder was made from, if any.

    Raises BadInput for damaged files and for differences that cannot be repaired.
    """
    made = HfFolder()
    for path in input_files(checkpoint):
        refuse_lfs_pointer(path)
    shutil.rmtree(hf, ignore_errors=True)
    hf.mkdir()
    for name in HF_FILES:
        if (checkpoint / name).is_file():
            _copy(checkpoint / name, hf / name, made)
    try:
        _verify(checkpoint, hf, model_config, gguf, made)
    except BadInput as error:
        first, *_ = str(error).replace(str(hf), str(checkpoint)).splitlines()
        raise BadInput(f"{first}\n{_advice(str(error))}") from None
    if made.tokenizer is not None:
        _stops(made, hf, vocab_size)
        _beyond(made, vocab_size)
    return made


def _copy(source: Path, target: Path, made: HfFolder) -> None:
    content = source.read_bytes()
    if source.suffix == ".json" and content.startswith(BYTE_ORDER_MARK):
        content = content[len(BYTE_ORDER_MARK) :]
        made.mended[source.name] = "byte order mark removed"
        made.remarks.append(f"{source.name}: byte order mark removed")
    target.write_bytes(content)


def _advice(message: str) -> str:
    _, *rest = message.splitlines()
    last = rest[-1] if rest else "Build or copy the bundle again."
    if any(f"chat template {fault}" in message for fault in ("is damaged", "refuses every", "drops")):
        return "Repair the template or remove it: a bundle without one takes raw prompts."
    return "Download the checkpoint again, or repair that file." if last.startswith("Build or copy") else last


def _verify(checkpoint: Path, hf: Path, model_config: Path | None, gguf: Path | None, made: HfFolder) -> None:
    if not any((checkpoint / name).is_file() for name in TOKENIZERS):
        made.remarks.append("no tokenizer (tokenizer.json or another format): the bundle takes token ids only")
        return
    made.tokenizer, made.template = _opened(hf), ChatTemplate.find(hf)
    theirs = _reference(checkpoint, hf, model_config, gguf, made)
    if theirs is None:
        _expect_no_repair(checkpoint, hf)
        made.tokenizer = made.tokenizer or Tokenizer.open(hf)
        made.compared = False
        lacking = "transformers" if gguf is None else "transformers with torch"
        made.remarks.append(f"tokenizer: opened, not compared: {lacking} is not installed. {INSTALL}")
    else:
        made.tokenizer = _repaired_tokenizer(made.tokenizer, hf, theirs, made)
        _repair_template(hf, theirs, made)
        _repair_special(hf, theirs, made)
        if made.mended_by:
            made.mended_by = mender()
            made.tokenizer = Tokenizer.open(hf)  # again: the files of its stop ids may have changed
        made.template = ChatTemplate.find(hf)
        _expect_same(hf, theirs, made)
    if made.template is not None:
        made.template.expect_question()


def _reference(checkpoint: Path, hf: Path, model_config: Path | None, gguf: Path | None, made: HfFolder) -> Any:
    """transformers' tokenizer of the checkpoint; of hf/ if byte order marks were removed there.

    None without transformers. Raises BadInput if it cannot read the checkpoint.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # about missing torch
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        return None
    transformers.logging.set_verbosity_error()
    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    folder = hf if made.mended else checkpoint
    what = f"the tokenizer of {checkpoint}" if model_config is None else str(model_config)
    try:
        if gguf is not None:
            if not gguf_reading.possible():
                return None
            what = f"the tokenizer of {gguf}"
            found, remarks = gguf_reading.tokenizer(gguf)
            made.remarks += remarks
            return found
        if model_config is not None:
            how["config"] = transformers.AutoConfig.from_pretrained(model_config, **how)
            what = f"the tokenizer of {checkpoint}"
        return transformers.AutoTokenizer.from_pretrained(folder, **how)
    except BaseException as error:  # a panic of the tokenizers library is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        words = " ".join(str(error).split()) or type(error).__name__
        if model_config is None and not _config_is_read(folder):
            what = f"config.json of {checkpoint}"
        advice = "Is its tokenizer complete?" if what.startswith("the tokenizer") else "Check the type of each value."
        advice = INSTALL if "pip install" in words or "requires the" in words else advice
        raise BadInput(f"transformers cannot read {what}: {words:.300}\n{advice}") from None


def _config_is_read(folder: Path) -> bool:
    """Whether AutoConfig reads the folder, so that the error is in another file than config.json."""
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        return "model type" in str(error) or "model_type" in str(error)  # an unknown type is not an error here
    except Exception:  # its classes can raise anything
        return False
    return True


def mender() -> str:
    """The library that repairs tokenizers here, as named in a manifest; empty without transformers."""
    try:
        return ", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "tokenizers"))
    except metadata.PackageNotFoundError:
        return ""


def _opened(hf: Path) -> Tokenizer | None:
    """The tokenizer as the runner opens it; None if it needs a tokenizer.json and there is none. Raises BadInput."""
    try:
        return Tokenizer.find(hf)
    except BadInput:
        if (hf / "tokenizer.json").is_file():
            raise
        return None


def _expect_no_repair(checkpoint: Path, hf: Path) -> None:
    """Without transformers: raises BadInput if a repair by it is known to be needed."""
    if not (hf / "tokenizer.json").is_file():
        if (hf / "vocab.json").is_file() and (hf / "merges.txt").is_file():
            return  # the runner may support them; otherwise it raises
        found = ", ".join(name for name in TOKENIZERS if (checkpoint / name).is_file())
        raise BadInput(f"{checkpoint} has {found}, but no tokenizer.json: making one needs transformers\n{INSTALL}")
    lacking = list(_lacking(hf))
    if lacking:
        raise BadInput(
            f"tokenizer.json of {checkpoint} lacks {_some(lacking)}, which other files add: "
            f"repairing it needs transformers\n{INSTALL}"
        )


def _lacking(hf: Path) -> Iterator[str]:
    """Tokens of other files that tokenizer.json lacks or has with other flags."""
    listed = hf_files.read_json(hf / "tokenizer.json").get("added_tokens") or []
    have = {token["content"]: token for token in listed}
    settings = hf_files.read_json(hf / "tokenizer_config.json")
    if "added_tokens_decoder" in settings:
        for number, token in settings["added_tokens_decoder"].items():
            there = have.get(token["content"])
            if there is None or any(there.get(key) != value for key, value in {**token, "id": int(number)}.items()):
                yield token["content"]
    else:
        for content, number in hf_files.read_json(hf / "added_tokens.json").items():
            if have.get(content, {}).get("id") != number:
                yield content
    yield from (content for content in dict.fromkeys(special_tokens(hf).values()) if content not in have)


def _repaired_tokenizer(ours: Tokenizer | None, hf: Path, theirs: Any, made: HfFolder) -> Tokenizer:
    """The runner's tokenizer, replaced by transformers' if they differ or `ours` is None. Raises BadInput."""
    path, name = hf / "tokenizer.json", "tokenizer.json"
    if ours is None:
        sources = [source for source in TOKENIZERS if source != name and (hf / source).is_file()]
        what = f"made from {' and '.join(sources) or 'other files'}"
    else:
        lacking = tokenizer_comparison.added_differences(ours, theirs)
        if lacking:
            what = f"tokens corrected to those of transformers: {_some(lacking)}"
        elif next(tokenizer_comparison.tokenizer_differences(ours, theirs), None) is not None:
            what = f"replaced by transformers' own: {_sections(path, theirs)} differ"
        else:
            return ours
    if not isinstance(getattr(theirs, "backend_tokenizer", None), tokenizers.Tokenizer):
        kind = type(theirs).__name__
        raise BadInput(f"transformers reads the tokenizer as {kind}, which has no tokenizer.json form\n{INSTALL}")
    backend = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    path.write_text(backend.to_str(), "utf-8", newline="\n")
    _repaired(made, name, what)
    ours = Tokenizer.open(hf)
    faults = chain(
        (f"added token {token} differs" for token in tokenizer_comparison.added_differences(ours, theirs)),
        tokenizer_comparison.tokenizer_differences(ours, theirs),
    )
    if (fault := next(faults, None)) is not None:
        raise BadInput(f"the tokenizer differs from transformers' and cannot be repaired: {fault}\nPlease report it.")
    return ours


def _sections(path: Path, theirs: Any) -> str:
    ours = hf_files.read_json(path)
    other = json.loads(theirs.backend_tokenizer.to_str())
    names = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")
    return ", ".join(name for name in names if ours.get(name) != other.get(name)) or "rules"


def _repair_special(hf: Path, theirs: Any, made: HfFolder) -> None:
    """Writes the special tokens of transformers if templates or the stop token use different ones."""
    wanted = {name: token for name, token in theirs.special_tokens_map.items() if name in SPECIAL}
    ours, source = special_tokens(hf), template_source(hf) or ""
    names = sorted(name for name in {*ours, *wanted} if ours.get(name) != wanted.get(name))
    if not any(name == "eos_token" or name in source for name in names):
        return
    path = hf / "tokenizer_config.json"
    settings = {key: value for key, value in hf_files.read_json(path).items() if key not in SPECIAL}
    added = {
        str(number): {"content": token.content, "special": token.special, "lstrip": token.lstrip}
        | {"rstrip": token.rstrip, "normalized": token.normalized, "single_word": token.single_word}
        for number, token in theirs.added_tokens_decoder.items()
    }
    path.write_text(_json({**settings, **wanted, "added_tokens_decoder": added}), "utf-8", newline="\n")
    listed = ", ".join(f"{name} is {wanted.get(name)!r}" for name in names)
    _repaired(made, path.name, f"{listed}, as in transformers")


def _repair_template(hf: Path, theirs: Any, made: HfFolder) -> None:
    """Writes the template that transformers uses, if the runner would use another."""
    found = theirs.chat_template
    if isinstance(found, dict):
        others = sorted(name for name in found if name != "default")
        if "default" not in found:
            made.remarks.append(f"chat template: {', '.join(others)} exist, but no default: none is used")
        elif others:
            made.remarks.append(f"chat template: the default one is used, not {', '.join(others)}")
        found = found.get("default")
    if found is not None and found != template_source(hf):
        (hf / "chat_template.jinja").write_bytes(found.encode())
        _repaired(made, "chat_template.jinja", "the template that transformers uses")


def _repaired(made: HfFolder, name: str, what: str) -> None:
    made.mended[name] = "; ".join([*([made.mended[name]] if name in made.mended else []), what])
    made.mended_by = "transformers"
    made.remarks.append(f"{name}: {what}")


def _expect_same(hf: Path, theirs: Any, made: HfFolder) -> None:
    """Raises BadInput naming the remaining differences between runner and transformers."""
    if made.template is None:
        return
    source = template_source(hf)
    if (fault := next(tokenizer_comparison.template_differences(made.template, theirs, str(source)), None)) is not None:
        raise BadInput(f"the chat template renders differently from transformers: {fault}\nPlease report it.")


def _stops(made: HfFolder, hf: Path, vocab_size: int) -> None:
    assert made.tokenizer is not None
    sources: Mapping[int, tuple[str, ...]] = made.tokenizer.stop_sources
    for number in [number for number in sources if number >= vocab_size]:
        made.remarks.append(
            f"stop id {number} of {', '.join(sources[number])} is outside the vocabulary of {vocab_size}: left out"
        )
    made.stop_ids = {number: named for number, named in sources.items() if number < vocab_size}
    if not made.stop_ids:
        made.remarks.append("stop ids: no file defines one, so answers continue to the token limit")
        return
    leading = next(name for name in (*SOURCE_ORDER, "chat template") if any(name in s for s in made.stop_ids.values()))
    if not all(leading in named for named in made.stop_ids.values()):
        listed = (
            f"{number} {made.tokenizer.token_bytes(number).decode('utf-8', 'replace')!r} ({', '.join(named)})"
            for number, named in made.stop_ids.items()
        )
        made.remarks.append(
            f"stop ids: the files disagree; each of these ends an answer, so nothing needs to be done: "
            f"{', '.join(listed)}"
        )


# precedence in transformers' generate
SOURCE_ORDER = ("generation_config.json", "config.json", "tokenizer_config.json")


def _beyond(made: HfFolder, vocab_size: int) -> None:
    """Adds a remark on ids beyond the vocabulary. Fewer ids are normal: the embedding is padded."""
    assert made.tokenizer is not None
    beyond = [f"{number} {token!r}" for token, number in made.tokenizer.vocabulary.items() if number >= vocab_size]
    if beyond:
        made.remarks.append(
            f"the tokenizer has {_some(beyond)}, but the model's vocabulary ends at {vocab_size - 1}: "
            "prompts with such a token are refused"
        )


def _some(names: list[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(islice(names, LISTED)) + (f" and {more} more" if more > 0 else "")


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
