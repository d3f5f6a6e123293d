"""Which files and tensors of a folder are used: the logits match transformers', or the folder is refused.

Each test makes a folder that could be misread; files that must not be read belong to a model with other weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from axrun.errors import BadInput
from tests.axc.as_transformers import (
    AUTO,
    SMALL,
    change_config,
    logits_of,
    ours,
    plan,
    random_model,
    same,
    theirs,
)
from tests.axc.axc import assert_done, llm_build

Tensors = dict[str, torch.Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def llama(tied: bool) -> Any:
    return transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied)


@pytest.fixture(scope="module")
def tied() -> Any:
    return random_model(llama(tied=True))


@pytest.fixture(scope="module")
def untied() -> Any:
    return random_model(llama(tied=False))


@pytest.fixture(scope="module")
def older() -> Any:
    return random_model(llama(tied=True), seed=7)


@pytest.fixture
def folder(tied: Any, tmp_path: Path) -> Path:
    """The tied model in one file."""
    tied.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def assert_agrees(folder: Path, model: Any, *notices: str) -> None:
    """Checks that transformers, the compiler and `model` agree, and that the build prints `notices`."""
    expected = logits_of(model)
    assert same(theirs(folder), expected)
    assert same(ours(folder, folder.parent / "out"), expected)
    said = "\n".join(plan(folder, folder.parent / "out").notices)
    assert bool(said) == bool(notices), said
    for words in notices:
        assert words in said


def assert_refused(folder: Path, *words: str) -> None:
    with pytest.raises(BadInput) as refused:
        plan(folder, folder.parent / "out")
    assert len(str(refused.value).splitlines()) <= 3
    for word in words:
        assert word in str(refused.value)


def save_sharded(model: Any, folder: Path, *, pickled: bool = False) -> list[str]:
    """Saves two shards with every second tensor each, and the index; returns their names."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != HEAD}
    suffix, stem = (".bin", "pytorch_model") if pickled else (".safetensors", "model")
    files = [f"{stem}-{i:05d}-of-00002{suffix}" for i in (1, 2)]
    names = sorted(tensors)
    for index, file in enumerate(files):
        part = {name: tensors[name] for name in names[index::2]}
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    write_index(folder, {name: files[i % 2] for i, name in enumerate(names)}, stem + suffix)
    return files


def write_index(folder: Path, weight_map: dict[str, str], of: str = SINGLE) -> None:
    (folder / f"{of}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Which files


def test_one_file_wins_over_an_index_of_missing_shards(folder: Path, tied: Any) -> None:
    write_index(folder, dict.fromkeys(tied.state_dict(), "model-00001-of-00002.safetensors"))
    assert_agrees(folder, tied, f"{SINGLE}, which transformers prefers; not read: {INDEX}")


def test_one_file_wins_over_older_shards(folder: Path, tied: Any, older: Any) -> None:
    files = save_sharded(older, folder)
    assert_agrees(folder, tied, SINGLE, INDEX, *files)


@pytest.mark.parametrize("sharded", [False, True])
def test_safetensors_win_over_pickles(folder: Path, tied: Any, older: Any, sharded: bool) -> None:
    torch.save(older.state_dict(), folder / "pytorch_model.bin")
    if sharded:
        (folder / SINGLE).unlink()
        save_sharded(tied, folder)
    assert_agrees(folder, tied, "not read: pytorch_model.bin")


def test_one_pickle_wins_over_older_shards(folder: Path, tied: Any, older: Any) -> None:
    (folder / SINGLE).unlink()
    save_sharded(older, folder, pickled=True)
    torch.save(tied.state_dict(), folder / "pytorch_model.bin")
    assert_agrees(folder, tied, "pytorch_model.bin, which transformers prefers", "pytorch_model.bin.index.json")


def test_shards_without_an_index_are_not_read(folder: Path, tied: Any, older: Any) -> None:
    (folder / SINGLE).unlink()
    save_sharded(tied, folder)
    save_file({"model.norm.weight": older.model.norm.weight.clone()}, folder / "model-00003-of-00003.safetensors")
    assert_agrees(folder, tied, "not read: model-00003-of-00003.safetensors")


def swap(weight_map: dict[str, str]) -> dict[str, str]:
    first, second = sorted(set(weight_map.values()))
    return {name: second if file == first else first for name, file in weight_map.items()}


@pytest.mark.parametrize(
    "rewrite",
    [
        pytest.param(swap, id="tensors are in the other shard"),
        pytest.param(
            lambda names: {f"odd.{i}": file for i, file in enumerate(set(names.values()))}, id="other tensors"
        ),
    ],
)
def test_all_tensors_of_the_shards_count(folder: Path, tied: Any, rewrite: Callable[[Any], dict[str, str]]) -> None:
    (folder / SINGLE).unlink()
    save_sharded(tied, folder)
    write_index(folder, rewrite(json.loads((folder / INDEX).read_text())["weight_map"]))
    assert_agrees(folder, tied)


def test_files_of_a_training_run_are_ignored(folder: Path, tied: Any) -> None:
    for name in ("training_args.bin", "optimizer.bin", "random_states_0.bin", "rng_state.pth", "optimizer.pt"):
        torch.save({"lr": 1.0}, folder / name)
    assert_agrees(folder, tied)


def test_a_consolidated_copy_is_named(folder: Path, tied: Any) -> None:
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")
    assert_agrees(folder, tied, "not read: consolidated.safetensors")


# Names


def resave(folder: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})
    return folder


def test_a_base_model_without_its_head(tied: Any, tmp_path: Path) -> None:
    """As written by LlamaModel.save_pretrained: names without the prefix `model.`."""
    tied.model.save_pretrained(tmp_path / "hf")
    assert "embed_tokens.weight" in load_file(tmp_path / "hf" / SINGLE)
    assert_agrees(tmp_path / "hf", tied, "LlamaModel", "built as a causal language model")


def test_an_untied_base_model_lacks_its_head(untied: Any, tmp_path: Path) -> None:
    """transformers would initialise it randomly."""
    untied.model.save_pretrained(tmp_path / "hf")
    _, report = AUTO.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert report["missing_keys"] == {HEAD}
    with pytest.raises(BadInput, match=r"1 tensor is missing .*: lm_head\.weight"):
        plan(tmp_path / "hf", tmp_path / "out")


def test_some_names_with_the_prefix_and_some_without(folder: Path, tied: Any) -> None:
    tensors = load_file(folder / SINGLE)
    resave(folder, {name.removeprefix("model.") if "layers.1" in name else name: t for name, t in tensors.items()})
    assert_agrees(folder, tied)


def test_a_head_below_the_base_model_s_prefix(untied: Any, tmp_path: Path) -> None:
    untied.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / SINGLE)
    resave(tmp_path / "hf", {f"model.{name}" if name == HEAD else name: t for name, t in tensors.items()})
    assert_agrees(tmp_path / "hf", untied)


def test_one_tensor_under_two_names(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    resave(folder, {**tensors, "norm.weight": tensors["model.norm.weight"] + 1})
    assert_refused(folder, "model.norm.weight is stored twice", "norm.weight in model.safetensors")


@pytest.mark.parametrize(
    ("prefix", "who"),
    [("module.", "DataParallel"), ("_orig_mod.", "torch.compile"), ("llm.", "wrapper"), ("base_model.model.", "PEFT")],
)
def test_prefixes_of_a_wrapper_are_refused(folder: Path, prefix: str, who: str) -> None:
    """transformers loads none of them and initialises all weights randomly."""
    tensors = load_file(folder / SINGLE)
    resave(folder, {prefix + name: tensor for name, tensor in tensors.items()})
    _, report = AUTO.from_pretrained(folder, output_loading_info=True)
    assert len(report["missing_keys"]) >= len(tensors)
    assert_refused(folder, f"begin with {prefix!r}", who)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
        ("model.layers.0.self_attn.q_proj.qweight", "quantised weights"),
        ("layers.0.attention.wq.weight", "names are Meta's"),
        ("model.norm.gamma", "TensorFlow"),
    ],
)
def test_tensor_names_of_other_formats(folder: Path, name: str, said: str) -> None:
    resave(folder, {**load_file(folder / SINGLE), name: torch.ones(64)})
    assert_refused(folder, said)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])
def test_rotary_tables_are_computed_not_read(folder: Path, tied: Any, name: str) -> None:
    resave(folder, {**load_file(folder / SINGLE), name: torch.full((8,), 3.0)})
    assert_agrees(folder, tied)


# The tied head


def axmodels(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.glob("*.axmodel")}


@pytest.mark.parametrize("form", ["safetensors", "another dtype", "state_dict()", "state_dict(), cloned"])
def test_a_copy_of_the_embedding_changes_nothing(folder: Path, tied: Any, form: str) -> None:
    ours(folder, folder.parent / "without")
    state = dict(tied.state_dict())
    if form.startswith("state_dict"):
        assert state[HEAD].data_ptr() == state[EMBEDDING].data_ptr()
        (folder / SINGLE).unlink()
        if "cloned" in form:
            state[HEAD] = state[HEAD].clone()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        copy = state[HEAD].clone()
        resave(folder, {**state, HEAD: copy.bfloat16() if form == "another dtype" else copy})
    assert_agrees(folder, tied)
    assert axmodels(folder.parent / "out") == axmodels(folder.parent / "without")


@pytest.mark.parametrize("where", [0, -1], ids=["the first value", "the last value"])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_head_that_differs_is_used(folder: Path, tied: Any, where: int, pickled: bool) -> None:
    tensors = {**tied.state_dict(), HEAD: tied.state_dict()[HEAD].clone()}
    tensors[HEAD].view(-1)[where] += 8
    if pickled:
        (folder / SINGLE).unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        resave(folder, tensors)
    model = AUTO.from_pretrained(folder, dtype=torch.float32).eval()
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert_agrees(folder, model, "tie_word_embeddings is true", HEAD, "differs")


@pytest.mark.parametrize(
    ("name", "head", "said"),
    [
        (HEAD, torch.ones(96, 64, dtype=torch.int8), "lm_head.weight of model.safetensors is stored as I8"),
        (HEAD, torch.ones(95, 64), "lm_head.weight has shape [95, 64], expected [96, 64]"),
        (HEAD, torch.ones(96), "lm_head.weight has shape [96]"),
        (f"draft.{HEAD}", torch.ones(96, 64), "1 tensor is not of this architecture: draft.lm_head.weight"),
    ],
)
def test_an_invalid_head_is_not_ignored(folder: Path, name: str, head: torch.Tensor, said: str) -> None:
    resave(folder, {**load_file(folder / SINGLE), name: head})
    assert_refused(folder, said)


def test_a_tied_model_that_stores_only_its_head(folder: Path, tied: Any, tmp_path: Path) -> None:
    tensors = load_file(folder / SINGLE)
    resave(folder, {HEAD if name == EMBEDDING else name: tensor for name, tensor in tensors.items()})
    assert_agrees(folder, tied)
    assert_done(llm_build(folder, tmp_path / "parallel", "--parallel", 2))


def test_an_untied_model_needs_its_embedding(untied: Any, tmp_path: Path) -> None:
    untied.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / SINGLE)
    resave(tmp_path / "hf", {name: tensor for name, tensor in tensors.items() if name != EMBEDDING})
    with pytest.raises(BadInput, match=r"1 tensor is missing .*: model\.embed_tokens\.weight"):
        plan(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_stored_head_is_used_if_config_json_does_not_mention_tying(tmp_path: Path, kind: str) -> None:
    model = random_model(transformers.AutoConfig.for_model(kind, **SMALL, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "hf")
    change_config(tmp_path / "hf", {}, without=("tie_word_embeddings",))
    assert_agrees(tmp_path / "hf", model)


def test_the_comparison_reads_blocks(tmp_path: Path, tied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are compared in blocks, not as a whole."""
    from axc import checkpoints as checkpoint

    tied.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / SINGLE)
    resave(tmp_path / "hf", {**tensors, HEAD: tensors[EMBEDDING]})
    monkeypatch.setattr(checkpoint, "BLOCK_ELEMENTS", 640)
    opened = checkpoint.Checkpoint.open(tmp_path / "hf")
    heights: list[int] = []
    rows = checkpoint.Checkpoint.rows

    def counted(self: Any, name: str, start: int, stop: int) -> Any:
        heights.append(stop - start)
        return rows(self, name, start, stop)

    monkeypatch.setattr(checkpoint.Checkpoint, "rows", counted)
    assert opened.equal(EMBEDDING, HEAD)
    assert max(heights) == 10
    assert len(heights) == 20


# Adapters and other kinds of folders


def test_an_adapter_next_to_weights(folder: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    words = ("holds weights and a PEFT adapter", "'org/base'", "this one as --lora", "remove adapter_config.json")
    assert_refused(folder, *words)


@pytest.mark.parametrize(
    ("config", "base"),
    [
        ('{"base_model_name_or_path": "org/base"}', "'org/base'"),
        ('{"base_model_name_or_path": "' + "x" * 5000 + '"}', "x" * 100),
        ('{"base_model_name_or_path": "a\\nb"}', "a\\nb"),
        ('{"base_model_name_or_path": 5}', "does not name"),
        ("[" * 100_000, "does not name"),
        ("", "does not name"),
    ],
)
def test_an_adapter_alone(tmp_path: Path, config: str, base: str) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(config)
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert_refused(folder, "is a PEFT adapter", base, "this one as --lora")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model-q4_0.gguf"], ["a GGUF file (model-q4_0.gguf)", "Give that file itself"]),
        (["consolidated.00.pth", "params.json"], ["authors' own format", "version for transformers"]),
        (["model.fp16.safetensors"], ["a variant (model.fp16.safetensors)", "Rename"]),
        (["model.safetensors.index.fp16.json"], ["a variant"]),
        (["model-00001-of-00002.safetensors"], ["without their index", "model.safetensors.index.json"]),
        (["pytorch_model-00001-of-00002.bin"], ["without their index", "pytorch_model.bin.index.json"]),
        (
            ["quantize_config.json", "gptq_model-4bit-128g.safetensors", "gptq_model-4bit-32g.safetensors"],
            ["of an older layout", "Give one .safetensors file"],
        ),
        (["tf_model.h5"], ["TensorFlow", "save_pretrained()"]),
        (["flax_model.msgpack"], ["Flax"]),
        (["last.ckpt"], ["training program", "state_dict()"]),
        (["model.onnx"], ["ONNX"]),
        (["adapter_model.safetensors"], ["an adapter", "adapter_config.json"]),
        (["snapshots/4b1d/config.json", "refs/main", "blobs/x"], ["download cache", "Give the snapshot", "4b1d"]),
        (["original/config.json"], ["holds no weights", "Give", "original, which holds a config.json"]),
    ],
)
def test_other_kinds_of_folders(tmp_path: Path, files: list[str], words: list[str]) -> None:
    for name in files:
        (tmp_path / "hf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hf" / name).write_bytes(b"")
    assert_refused(tmp_path / "hf", *words)


def test_a_distributed_checkpoint_wins_in_transformers_and_is_refused(folder: Path) -> None:
    shutil.copy(folder / SINGLE, folder / "shard-00000-model-00001-of-00001.safetensors")
    assert_refused(folder, "torch.distributed checkpoint", "save_pretrained()")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_a_git_lfs_pointer(folder: Path, name: str) -> None:
    if name == INDEX:
        (folder / SINGLE).unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    assert_refused(folder, name, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize("entry", ["state_dict", "model", "module"])
def test_a_pickle_of_more_than_the_model(folder: Path, tied: Any, entry: str) -> None:
    """transformers finds none of the tensors in it."""
    (folder / SINGLE).unlink()
    torch.save({entry: dict(tied.state_dict()), "epoch": 1}, folder / "pytorch_model.bin")
    assert_refused(folder, "pytorch_model.bin", f"its entry '{entry}'", "alone")


def test_a_mixed_index(folder: Path) -> None:
    (folder / SINGLE).unlink()
    write_index(folder, {EMBEDDING: "a.safetensors", HEAD: "b.bin"})
    assert_refused(folder, INDEX, "both .safetensors and .bin")
