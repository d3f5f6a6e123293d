"""Healthy bundles, built once; copies of them to damage; and both doctors, called in this process."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import axc.cli
import axrun.cli
from axc import expected, logits, reference
from axrun import decoder
from axrun.decoder import Decoder
from axrun.doctor import installed, runner
from axrun.format import axmodel
from axrun.kv_cache import KVCache
from axrun.model import Model
from axrun.sequence import Sequence
from axrun.session import ax_engine, ort
from axrun.text.tokenizer import Tokenizer
from tests.conftest import ROOT, Builder
from tests.doctor import axmodels, checkpoints

GROUPS: dict[str, Any] = {"prefill_len": 32, "kv_cache_len": 255, "last_kv_cache_len": (32, 128)}
TYPES: dict[str, dict[str, str]] = {
    "s8": {},
    "s4": {"weight_type": "s4", "post_weight_type": "s4"},
    "fp32": {"hidden_state_type": "fp32", "weight_type": "fp32", "post_weight_type": "fp32"},
    "fp16": {"hidden_state_type": "fp16", "weight_type": "fp16", "post_weight_type": "fp16"},
}
TEXTS = (".json", ".jinja", ".model", ".txt")  # files from which a tokenizer is made


@dataclass(frozen=True)
class Said:
    """What a doctor printed with --json, its exit code, and stderr."""

    code: int
    report: dict[str, Any]
    errors: str

    @property
    def finding(self) -> dict[str, str]:
        return dict(self.report.get("finding") or {})

    def __str__(self) -> str:
        stages = [(each["stage"], each["outcome"], each["text"]) for each in self.report.get("stages", ())]
        return f"exit {self.code}, {self.report.get('verdict')}, {self.finding}, {stages}, {self.errors}"


Doctor = Callable[..., Said]
Base = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="package", autouse=True)  # not for the session: other tests use threads
def _one_thread() -> Iterator[None]:
    """One thread for torch, tokenizers and both engines: the models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        for engine in (ax_engine, ort):
            patch.setattr(engine, "open_session", functools.partial(_alone, engine.open_session))
        yield
    torch.set_num_threads(threads)


def _alone(open_session: Callable[..., Any], path: Path, threads: int | None = None, **more: Any) -> Any:
    return open_session(path, threads or 1, **more)


@pytest.fixture(scope="package", autouse=True)
def _read_once() -> Iterator[None]:
    """Caches slow results: the reference, transformers' tokenizers, the query of the engine, and axmodels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(installed, "ask", functools.lru_cache(installed.ask))
        patch.setattr(axmodel, "read", _by_file(axmodel.read))
        patch.setattr(expected, "ask", _by_question(expected.ask))
        patch.setattr(reference, "Reference", functools.lru_cache(16)(reference.Reference))
        patch.setattr(reference, "tokenizer", _remembering(reference.tokenizer))
        patch.setattr(runner, "examine", _by_runner(runner.examine))
        yield


def _by_runner(examine: Callable[..., Any]) -> Callable[..., Any]:
    """Caches by shape and by the runner's functions, since faults are planted in those."""
    known: dict[tuple[object, ...], Any] = {}

    def again(*shape: Any) -> Any:
        code = [*vars(decoder).values()]
        code += [part for kind in (Decoder, KVCache, Model, Sequence) for part in vars(kind).values()]
        key = (*shape, *map(id, code))
        if key not in known:
            known[key] = code, examine(*shape)  # a kept object keeps its id
        return known[key][1]

    return again


def _remembering(tokenizer: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Caches transformers' tokenizer by its files, and its results by their inputs."""
    known: dict[tuple[object, ...], Any] = {}

    def opened(path: Path) -> Any:
        try:
            files = sorted(path.iterdir()) if path.is_dir() else []
            key = tuple((file.name, _content(file)) for file in files if file.suffix in TEXTS)
        except ValueError:
            return tokenizer(path)
        if not key:  # a GGUF file
            return tokenizer(path)
        if key not in known:
            known[key] = remembering(tokenizer(path))
        return known[key]

    def remembering(theirs: Any) -> Any:
        kind: Any = type(theirs)
        encoded: dict[str, Any] = {}
        decoded: dict[str, str] = {}

        def call(self: Any, *given: Any, **options: Any) -> Any:
            key = repr((given, sorted(options.items())))
            if key not in encoded:
                encoded[key] = kind.__call__(self, *given, **options)
            return encoded[key]

        def decode(self: Any, *given: Any, **options: Any) -> Any:
            key = repr((given, sorted(options.items())))
            if key not in decoded:
                decoded[key] = kind.decode(self, *given, **options)
            return decoded[key]

        theirs.__class__ = type(kind.__name__, (kind,), {"__call__": call, "decode": decode})
        return theirs

    return opened


def _content(file: Path) -> bytes:
    """The part of a file that affects the tokenizer: the model_type of config.json, all of other files."""
    content = file.read_bytes()
    return str(json.loads(content).get("model_type")).encode() if file.name == "config.json" else content


def _by_file(read: Callable[[Path], axmodel.Axmodel]) -> Callable[[Path], axmodel.Axmodel]:
    """Caches by path, inode, time and size."""
    known: dict[tuple[object, ...], axmodel.Axmodel] = {}

    def again(path: Path) -> axmodel.Axmodel:
        try:
            status = os.stat(path)
        except OSError:
            return read(path)
        key = (os.fspath(path), status.st_ino, status.st_mtime_ns, status.st_size)
        if key not in known:
            known[key] = read(path)
        return known[key]

    return again


def _by_question(ask: Callable[..., expected.Expected]) -> Callable[..., expected.Expected]:
    """Caches by reference, shape of the bundle and prompt."""
    known: dict[tuple[object, ...], tuple[object, expected.Expected]] = {}

    def again(reference: Any, bundle: Any, prompt: str, asked: list[int], **options: Any) -> expected.Expected:
        tokenizer = Tokenizer.find(bundle.hf)
        ids = (tuple(asked), tuple(tokenizer.encode(prompt)), tokenizer.stop_ids) if tokenizer else ()
        key = (id(reference), json.dumps(bundle.manifest["model"], sort_keys=True), ids, *sorted(options.items()))
        if key not in known:
            known[key] = reference, ask(reference, bundle, prompt, asked, **options)
        return known[key][1]

    return again


@pytest.fixture(scope="session")
def llama(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 checkpoint with an untied head and scaled rope."""
    return checkpoints.llama(tmp_path_factory.mktemp("checkpoint") / "llama", tiny_qwen2)


@pytest.fixture(scope="session")
def base(build_tiny: Builder, tiny_qwen2: Path, llama: Path) -> Base:
    """A healthy bundle by name, and its checkpoint: tiny-qwen2 as s8, s4, fp32; a Llama as llama (fp32), fp16."""
    made: dict[str, tuple[Path, Path]] = {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in made:
            checkpoint = llama if name in ("llama", "fp16") else tiny_qwen2
            bundle = build_tiny(input_path=checkpoint, **TYPES["fp32" if name == "llama" else name])
            leave_figures(bundle, checkpoint)
            made[name] = bundle, checkpoint
        return made[name]

    return get


@pytest.fixture
def copy(base: Base, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A copy of a healthy bundle made of hard links, and its checkpoint."""

    def make(name: str) -> tuple[Path, Path]:
        bundle, checkpoint = base(name)
        return Path(shutil.copytree(bundle, tmp_path / "bundle", copy_function=os.link)), checkpoint

    return make


def leave_figures(bundle: Path, checkpoint: Path, **options: Any) -> None:
    """Stores the figures for `axrun doctor`, from a short text, as `axc reference --bundle` does."""
    text = ROOT / "models" / "tiny-qwen2" / "heldout.txt"
    short: dict[str, Any] = {"window": 48, "tokens": 96, "top_k": 8, "greedy_tokens": 8}
    logits.write(logits.Options(input_path=checkpoint, text=text, bundle=bundle, **short, **options))


def placed(pattern: str, bundle: Path) -> list[str]:
    """The file names of a fault's `file`."""
    names = {"layer0": axmodels.layer(bundle, 0), "layer": axmodels.layer(bundle, 1), "post": axmodels.post(bundle)}
    return [name.format(**names) for name in pattern.split("|")]


@pytest.fixture
def axc_doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """axc doctor BUNDLE --checkpoint DIR --json."""

    def ask(bundle: Path, checkpoint: Path, *flags: str) -> Said:
        capsys.readouterr()
        code = axc.cli.main(["doctor", str(bundle), "--checkpoint", str(checkpoint), "--json", *flags])
        return _said(code, capsys)

    return ask


@pytest.fixture
def axrun_doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """axrun doctor BUNDLE --json."""

    def ask(bundle: Path, *flags: str) -> Said:
        capsys.readouterr()
        return _said(axrun.cli.main(["doctor", str(bundle), "--json", *flags]), capsys)

    return ask


def _said(code: int, capsys: pytest.CaptureFixture[str]) -> Said:
    printed = capsys.readouterr()
    return Said(code, json.loads(printed.out) if printed.out.strip() else {}, printed.err)
