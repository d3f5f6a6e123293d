"""What sentence-transformers' files say of pooling is carried into the manifest, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from axc import pooling
from axrun.errors import BadInput
from tests.embedding_models import MODULES, QUERY, dump

WIDTH = 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "1_Pooling").mkdir()
    dump(tmp_path / "modules.json", MODULES)
    dump(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_lasttoken": True, "include_prompt": True})
    return tmp_path


def test_a_folder_without_such_files_has_no_pooling(tmp_path: Path) -> None:
    assert pooling.read(tmp_path, WIDTH) is None
    assert pooling.input_files(tmp_path) == ()


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True}, "mean"),
        ({"embedding_dimension": WIDTH, "pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({"pooling_mode": "lasttoken", "pooling_mode_cls_token": True}, "lasttoken"),  # the new key wins
        ({"pooling_mode_cls_token": False}, "mean"),  # the default
    ],
)
def test_modes(folder: Path, values: dict[str, Any], mode: str) -> None:
    dump(folder / "1_Pooling" / "config.json", values)
    found = pooling.read(folder, WIDTH)
    assert found == pooling.Pooling(mode, True)


def test_pooling_without_modules_is_normalised(folder: Path) -> None:
    (folder / "modules.json").unlink()
    assert pooling.read(folder, WIDTH) == pooling.Pooling("lasttoken", True)
    assert pooling.input_files(folder) == (folder / "1_Pooling" / "config.json",)


def test_length_normalisation_and_prompts(folder: Path) -> None:
    dump(folder / "modules.json", MODULES[:2])
    dump(folder / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    dump(folder / "config_sentence_transformers.json", {"prompts": {"query": QUERY, "document": ""}})
    found = pooling.read(folder, WIDTH)
    assert found is not None
    assert found.manifest() == {"mode": "lasttoken", "normalize": False, "max_tokens": 512}
    assert found.remarks == (f"prompts of the checkpoint, for clients to put before a text: query: {QUERY!a}",)
    names = ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"]
    assert [path.relative_to(folder).as_posix() for path in pooling.input_files(folder)] == names


def module(kind: object, path: object = "") -> dict[str, Any]:
    return {"idx": 0, "name": "0", "path": path, "type": kind}


CUSTOM = "custom_st.Transformer"
DENSE = "sentence_transformers.models.Dense"
REFUSED: list[tuple[str, Any, str]] = [
    ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling mode cls; expected one of lasttoken, mean"),
    ("1_Pooling/config.json", {"pooling_mode": ["mean", "max"]}, "pooling mode mean, max"),
    ("1_Pooling/config.json", {"pooling_mode": 3}, "pooling mode 3"),
    ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt is false"),
    ("1_Pooling/config.json", {"word_embedding_dimension": 32}, "word_embedding_dimension is 32.* hidden_size is 64"),
    ("1_Pooling/config.json", {"pooling_mode_best": True}, "has 'pooling_mode_best', which is not known"),
    ("modules.json", [*MODULES, module(DENSE, "3_Dense")], "lists Transformer, Pooling, Normalize, Dense; expected"),
    ("modules.json", MODULES[:1], "lists Transformer; expected"),
    ("modules.json", [], "lists no modules"),
    ("modules.json", [module(CUSTOM), *MODULES[1:]], f"a module '{CUSTOM}', which is not one of"),
    ("modules.json", [*MODULES, MODULES[2]], "lists Normalize twice"),
    ("modules.json", [module(MODULES[0]["type"], "0_Transformer"), *MODULES[1:]], "Transformer in the folder"),
    ("modules.json", [MODULES[0], module(MODULES[1]["type"], "../other")], r"a module in '\.\./other'"),
    ("modules.json", {"a": 1}, "cannot read"),
    ("modules.json", [1], "cannot read"),
    ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, "module_input_name is 'token_embeddings'"),
    ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case is True, which is not supported"),
    ("sentence_bert_config.json", {"max_seq_length": "512"}, "max_seq_length is '512'; expected a number"),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "transformer_task is 'fill-mask'"),
    ("sentence_bert_config.json", {"query_length": 32}, "query_length is 32, which is not supported"),
    ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "model_type is 'SparseEncoder'"),
    (
        "config_sentence_transformers.json",
        {"prompts": {"query": QUERY}, "default_prompt_name": "query"},
        "default_prompt_name is 'query': a prompt before every text is not supported",
    ),
]


@pytest.mark.parametrize(("file", "values", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_what_cannot_be_done_is_refused_by_name(folder: Path, file: str, values: Any, words: str) -> None:
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))
    with pytest.raises(BadInput, match=words) as refused:
        pooling.read(folder, WIDTH)
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3
