"""Pins a repository of the Hugging Face Hub at its first download: the commit, and a digest of every file that is read.

Pins have the format of `[source]` in models/<name>.toml, and are stored beside the download in the Hub's cache. Later
builds use that commit and those digests without a request to the Hub, until that file is removed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axc.models import COMMIT, Hub, PinnedFile, source_of
from axrun.errors import BadInput

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

SECONDS = 8.0  # without an answer, before the Hub counts as out of reach
REFUSED = (401, 403, 404)  # mirrors do not all say which it is
MOST_FILES = 2000  # of a repository: shards of the largest models are some hundred
MOST_BYTES = 8 << 20  # of the file of pins
SHARD = re.compile(r"[\w.-]+-\d+-of-\d+\.(safetensors|bin)", re.ASCII)
PLAIN = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)  # names of files that are read
REMARKS = ("adapter_config.json",)  # axc.checkpoints refuses it


def pin(name: str, source: Hub) -> Hub:
    """`source` at a commit, with its files: as pinned before, or as the Hub has them now, which is said.

    `name` is what `make build MODEL=` was given. Raises BadInput when the Hub cannot be asked or has no such model.
    """
    kept = kept_at(source)
    if kept.is_file():
        return _read(kept, source)
    info = _ask(name, source)
    if not info.sha or not re.fullmatch(COMMIT, info.sha):
        raise BadInput(f"the Hub does not name the commit of {source.repo} at {source.revision}: it says {info.sha!a}")
    pinned = Hub(source.repo, info.sha, tuple(_files(source, info)))
    text = "\n".join(toml(pinned))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{kept.name}.incomplete")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(kept)
    except OSError as error:
        raise BadInput(f"cannot write {kept}: {error.strerror}\nName a cache elsewhere in HF_HOME.") from None
    print(f"{source.repo} was not pinned. Its {source.revision} is now pinned at commit {info.sha}:\n")
    print(text)
    print(f"\nThese lines are in {kept}. Remove that file to get a newer commit, or paste them into a models/*.toml.")
    return pinned


def kept_at(source: Hub) -> Path:
    """Where the pins of a repository are kept."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=source.repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "axc-pins" / f"{source.revision}.toml"


def toml(pinned: Hub) -> Iterator[str]:
    """The lines of `[source]` in a models/<name>.toml."""
    yield from ("[source]", f'repo = "{pinned.repo}"', f'revision = "{pinned.revision}"', "", "[source.files]")
    for each in pinned.files:
        digest = f'sha256 = "{each.sha256}"' if each.sha256 else f'git_blob = "{each.git_blob}"'
        yield f'"{each.name}" = {{ {"" if each.size is None else f"size = {each.size}, "}{digest} }}'


def _read(kept: Path, source: Hub) -> Hub:
    try:
        if kept.stat().st_size > MOST_BYTES:
            raise BadInput(f"it has more than {MOST_BYTES} bytes")
        found = source_of(tomllib.loads(kept.read_text(encoding="utf-8")))
        if not isinstance(found, Hub) or found.repo != source.repo or not found.files:
            raise BadInput(f"it does not pin {source.repo}")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, BadInput) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{kept}: {reason[:200]}\nRemove it and run again: the Hub is asked anew.") from None
    return found


def _ask(name: str, source: Hub) -> ModelInfo:
    import httpx2
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    where = f"{source.repo} at {constants.ENDPOINT}"
    copy = f"or give a copy: make build MODEL={name} MODEL_DIR=/path/to/{source.repo.partition('/')[2]}"
    token = "a token that may read it is taken from HF_TOKEN, or from `hf auth login`"
    try:
        return HfApi().model_info(source.repo, revision=source.revision, files_metadata=True, timeout=SECONDS)
    except GatedRepoError:
        raise BadInput(
            f"{where} is gated: accept its terms on its page there, and run again;\n{token}\n{copy}"
        ) from None
    except RevisionNotFoundError:
        raise BadInput(f"{where} has no revision {source.revision}\n{copy}") from None
    except (httpx2.HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in REFUSED:
            raise BadInput(f"there is no {where}, or it is private or gated;\n{token}\n{copy}") from None
        seen = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
        raise BadInput(
            f"{source.repo} is not pinned yet, and {constants.ENDPOINT} does not answer ({seen[:160]})\n"
            f"connect this machine, or name a mirror in HF_ENDPOINT, and run again\n{copy}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{constants.ENDPOINT} does not answer as the Hub does ({type(error).__name__}: {str(error)[:120]})\n"
            f"name another mirror in HF_ENDPOINT,\n{copy}"
        ) from None


def _files(source: Hub, info: ModelInfo) -> Iterator[PinnedFile]:
    """What is read of a repository: its texts, and the weights that transformers prefers."""
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or () if isinstance(sibling.rfilename, str)}
    if len(siblings) > MOST_FILES:
        raise BadInput(f"{source.repo} has {len(siblings)} files, more than {MOST_FILES}: it is not a model")
    for name in (*_texts(siblings), *_weights(source, siblings)):
        sibling = siblings[name]
        digest: dict[str, Any] = (
            {"sha256": sibling.lfs.sha256} if sibling.lfs else {"git_blob": sibling.blob_id}  # git's id of a plain file
        )
        size = sibling.size if type(sibling.size) is int else None
        try:
            yield PinnedFile(name, **digest, size=size)
        except (BadInput, TypeError) as error:
            raise BadInput(f"the Hub's list of {source.repo} cannot be used: {str(error)[:200]}") from None


def _texts(names: Sequence[str] | dict[str, Any]) -> list[str]:
    from axc import pooling
    from axc.checkpoints.folder import SETTINGS_FILES
    from axc.hf_folder import HF_FILES, OTHER_FILES, OTHER_TEMPLATES

    texts = {*HF_FILES, *OTHER_FILES, *REMARKS, *SETTINGS_FILES, *pooling.FILES}
    return sorted(name for name in names if PLAIN.fullmatch(name) and (name in texts or fnmatch(name, OTHER_TEMPLATES)))


def _weights(source: Hub, names: dict[str, Any]) -> list[str]:
    from axc.checkpoints.folder import ORDER, sole_weight_file

    for whole, index in (*ORDER, *sole_weight_file(names)):
        if whole in names:
            return [whole]
        if index in names:
            suffix = Path(whole).suffix
            return sorted(
                [index, *(name for name in names if SHARD.fullmatch(name) and name.endswith(suffix) and name != index)]
            )
    seen = ", ".join(f"{name:.60}" for name in sorted(names, key=_least_telling)[:8]) or "nothing"
    raise BadInput(
        f"{source.repo} holds no model.safetensors or pytorch_model.bin, or index of one: it has {seen!a}\n"
        "Name the repository of the original weights, or download what is to be built (a GGUF is one file)\n"
        f"and give it: make build MODEL={source.repo} MODEL_DIR=/path"
    )


def _least_telling(name: str) -> tuple[bool, str]:
    return not name.endswith((".gguf", ".safetensors", ".bin", ".pth", ".pt")), name
