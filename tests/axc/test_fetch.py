"""fetch, against the real huggingface_hub client and a server of the Hub's routes on loopback."""

from __future__ import annotations

import hashlib
import signal
import time
from pathlib import Path

import pytest

from tests.axc.hub_server import FILES, REPO, WEIGHTS, Client, Hub, git_blob


def test_a_download_is_complete_and_cached(hub: Hub, client: Client, dead_end: str) -> None:
    code, out, err = client.fetch(hub.url)
    assert (code, err) == (0, "")
    assert {file.name: file.read_bytes() for file in Path(out).iterdir()} == FILES
    assert sorted(hub.gets) == [("config.json", None), ("model.safetensors", None)]
    assert client.fetch(dead_end) == (0, out, "")


def test_a_cut_connection_is_resumed_within_a_run(hub: Hub, client: Client) -> None:
    hub.cut = [15 << 20]
    code, out, _ = client.fetch(hub.url)
    assert code == 0
    assert (Path(out) / "model.safetensors").read_bytes() == WEIGHTS
    assert [asked for name, asked in hub.gets if name == "model.safetensors"] == [None, f"bytes={10 << 20}-"]


def test_a_killed_download_is_resumed_by_the_next_run(hub: Hub, client: Client) -> None:
    hub.cut, hub.stalling = [21 << 20], True
    process = client.start(hub.url)
    assert hub.stall.wait(300)
    deadline = time.monotonic() + 300
    while not any(part.stat().st_size >= 20 << 20 for part in client.cache.rglob("*.incomplete")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    code, out, _ = client.fetch(hub.url)
    assert code == 0
    assert (Path(out) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.gets[-1] == ("model.safetensors", f"bytes={20 << 20}-")
    assert not list(client.cache.rglob("*.incomplete"))


def test_a_corrupted_download_is_refused_and_not_kept(hub: Hub, client: Client) -> None:
    hub.files["model.safetensors"] = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    code, out, err = client.fetch(hub.url)
    assert (code, out) == (2, "")
    assert "model.safetensors is not the pinned file: it is thrown away, run again" in err
    assert f"sha256 seen     {hashlib.sha256(hub.files['model.safetensors']).hexdigest()}" in err
    assert f"sha256 expected {hashlib.sha256(WEIGHTS).hexdigest()}" in err
    assert len(err.splitlines()) == 3

    hub.files["model.safetensors"] = WEIGHTS
    code, out, _ = client.fetch(hub.url)
    assert code == 0
    assert (Path(out) / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_cached_file_is_refused_with_its_path(hub: Hub, client: Client) -> None:
    _, out, _ = client.fetch(hub.url)
    damaged = (Path(out) / "config.json").resolve()
    damaged.write_bytes(FILES["config.json"].replace(b"toy", b"top"))
    code, _, err = client.fetch(hub.url)
    assert code == 2
    assert f"config.json is not the pinned file: remove {damaged} and run again" in err
    assert f"git blob expected {git_blob(FILES['config.json'])}" in err


def test_a_missing_file_of_the_hub_is_named(hub: Hub, client: Client) -> None:
    del hub.files["config.json"]
    code, _, err = client.fetch(hub.url)
    assert code == 2
    assert f"config.json of {REPO} did not come from {hub.url}" in err


@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_network_one_error_names_both_remedies(client: Client, dead_end: str, more: dict[str, str]) -> None:
    started = time.monotonic()
    code, out, err = client.fetch(dead_end, **more)
    assert time.monotonic() - started < 60
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 3
    assert "connect this machine, or name a mirror in HF_ENDPOINT" in err
    assert "make build MODEL=toy MODEL_DIR=/path/to/toy" in err


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "a copy"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_local_copy_is_used_in_place(client: Client, copy: Path, dead_end: str) -> None:
    assert client.fetch(dead_end, str(copy)) == (0, str(copy), "")


def test_a_copy_without_some_files_lists_missing_and_found_ones(client: Client, copy: Path, dead_end: str) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    code, _, err = client.fetch(dead_end, str(copy))
    assert code == 2
    assert f"{copy} lacks model.safetensors of {REPO}\nit has config.json, pytorch_model.bin" in err


def test_a_truncated_copy_is_refused_by_its_size(client: Client, copy: Path, dead_end: str) -> None:
    (copy / "model.safetensors").write_bytes(WEIGHTS[:1000])
    code, _, err = client.fetch(dead_end, str(copy))
    assert code == 2
    assert f"model.safetensors has 1000 bytes, {len(WEIGHTS)} are pinned" in err


def test_another_file_of_the_same_size_is_refused_by_its_digest(client: Client, copy: Path, dead_end: str) -> None:
    (copy / "config.json").write_bytes(FILES["config.json"][::-1])
    code, _, err = client.fetch(dead_end, str(copy))
    assert code == 2
    assert "config.json is not the pinned file" in err
    assert "axc llm_build" in err
