"""A health check over a real SSH server: the known-good bundle is deployed once, and changes to it are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ci.device import deploy
from ci.nightly import health, health_log
from ci.nightly.health_log import FIRST, HEALTHY, UNHEALTHY, Check
from tests.deploy.conftest import Place, host_package

pytestmark = pytest.mark.system


def test_the_known_good_bundle_is_deployed_once_and_changes_are_found(
    host: Place, bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    package = host_package(tmp_path / "package")

    def check() -> Check:
        return health.check(
            host.board, tmp_path / "history", tmp_path, said.append, package=lambda: package, at=host.at
        )

    first = check()
    assert (first.word, first.faults) == (FIRST, ())
    assert first.tokens == health.ANSWER
    assert first.speed["decode_tokens_per_s"] > 0
    assert first.sizes["memory"] > 0
    version, program, digest = first.versions["python"].split(", ")
    assert version.startswith(f"{host.board.python}.")
    assert Path(program).is_absolute()
    assert digest.startswith("sha256 ")

    deploy.deploy(host.board, host.at, host_package(tmp_path / "night", b"other"), bundles[0], "1+1=", keep=1)
    said.clear()
    second = check()
    assert (second.word, second.kit) == (HEALTHY, first.kit), "a deploy prunes its own releases"
    assert said == []

    kit = host.root / "health"
    (tokenizer,) = kit.glob("models/*/hf/tokenizer.json")
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("a", "b", 1))
    changed = check()
    assert changed.word == UNHEALTHY
    assert changed.faults[0].startswith("the known-good bundle differs from the deployed one: health/models/")
    assert "/hf/tokenizer.json has other bytes than were deployed" in changed.faults[0]
    tokenizer.write_text(text)

    record = health_log.place(tmp_path / "history", "host") / health.KIT
    kept = json.loads(record.read_text())
    record.write_text(json.dumps({**kept, "tokens": [*kept["tokens"][:4], 1, 2]}))
    otherwise = check()
    assert otherwise.faults == (
        "its answer to 'who are you?' differs from token 5 on: [88, 12, 80, 86], expected [1, 2]",
    )
    record.write_text(json.dumps(kept))

    shutil.rmtree(kit)
    fresh = check()
    assert fresh.faults == ()
    assert said[0] == "first check of this board: deploying the known-good bundle"
    assert [found.word for found in health_log.read(record.parent)] == [
        FIRST,
        HEALTHY,
        UNHEALTHY,
        UNHEALTHY,
        fresh.word,
    ]
