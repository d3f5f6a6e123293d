"""The recipe of docs/adding-a-family.md works: with its example file, a build gives the logits of transformers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from axc import families
from tests.axc.as_transformers import FP32, IDS, SMALL, random_model, same, theirs
from tests.conftest import ROOT

RECIPE = ROOT / "docs" / "adding-a-family.md"
BUILD_AND_RUN = """
import json, sys
from pathlib import Path
import numpy as np
from axc.build import Options, build, plan
from axrun.format.bundle import Bundle
from axrun.model import Model
folder, output, ids, result, options = sys.argv[1:]
planned = plan(Options(Path(folder), Path(output), **json.loads(options)))
build(planned)
np.save(result, Model.load(Bundle.open(Path(output)), "ort").forward(json.loads(ids), 0, logits="all"))
print(planned.config.model_type)
"""


@pytest.fixture
def followed(tmp_path: Path) -> dict[str, Path]:
    """A copy of both packages with the recipe's file added, and a random checkpoint of that family."""
    import transformers

    for package in (ROOT / "board" / "axrun", ROOT / "toolchain" / "axc"):
        shutil.copytree(package, tmp_path / "code" / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    text = RECIPE.read_text()
    (place,) = re.findall(r"`toolchain/(axc/families/\w+\.py)`", text)
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert source == (ROOT / "toolchain" / place).read_text()  # the tree has it too, as the recipe shows it
    kind = Path(place).stem
    (tmp_path / "code" / place).unlink()
    assert not [path for path in (tmp_path / "code").rglob("*.py") if kind in path.read_text() and path.stem != "llama"]
    (tmp_path / "code" / place).write_text(source)
    config: Any = transformers.AutoConfig.for_model(kind, **SMALL, head_dim=16, attention_bias=True)
    random_model(config).save_pretrained(tmp_path / "hf")
    return {"code": tmp_path / "code", "checkpoint": tmp_path / "hf", "output": tmp_path / "out"}


def test_the_recipe_builds_its_family(followed: dict[str, Path], tmp_path: Path) -> None:
    options = {**FP32, "prefill_len": 16, "kv_cache_len": 63}
    result = tmp_path / "logits.npy"
    arguments = [followed["checkpoint"], followed["output"], json.dumps(IDS.tolist()), result, json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-c", BUILD_AND_RUN, *map(str, arguments)],
        env={"PYTHONPATH": str(followed["code"]), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["helium"]
    assert same(np.load(result), theirs(followed["checkpoint"]))


def test_the_path_of_the_recipe_in_errors_exists() -> None:
    assert ROOT / families.RECIPE == RECIPE
    assert RECIPE.is_file()
