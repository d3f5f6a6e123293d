"""Repositories without pins get them at the first download, tested with a server of the Hub's routes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from axc import models
from axc.models import Hub as Source
from tests.axc.hub_server import REPO, REVISION, Client, Hub, git_blob

TEXTS = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "chat_template.jinja": b"{{ x }}", "merges.txt": b"a b"}
WHOLE = {**TEXTS, "model.safetensors": b"weights"}
SHARDS = {
    **TEXTS,
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
}
AUTOGPTQ = {**TEXTS, "quantize_config.json": b"{}", "gptq_model-4bit-128g.safetensors": b"weights"}
UNREAD = {"README.md": b"#", ".gitattributes": b"", "onnx.bin": b"0", "code.py": b"1"}
BOTH = {"pytorch_model.bin": b"the same"}


def kept(client: Client) -> Path:
    return client.cache / "models--owner--toy" / "axc-pins" / "main.toml"


@pytest.mark.parametrize(
    ("files", "unread"),
    [(WHOLE, BOTH), (SHARDS, BOTH), ({**TEXTS, "pytorch_model.bin": b"weights"}, {}), (AUTOGPTQ, {})],
)
def test_needed_files_are_downloaded_and_pinned(
    files: dict[str, bytes], unread: dict[str, bytes], hub: Hub, client: Client, dead_end: str
) -> None:
    hub.publish({**UNREAD, **unread, **files})
    code, out, err = client.fetch(hub.url, model=REPO)
    assert (code, err) == (0, "")
    *said, folder = out.splitlines()
    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == files

    assert said[0] == f"{REPO} was not pinned. Its main is now pinned at commit {REVISION}:"
    assert said[-1].startswith(f"These lines are in {kept(client)}. Remove that file to get a newer commit")
    assert "\n".join(said[2:-2]) + "\n" == kept(client).read_text()
    toml = client.folder / "pasted.toml"  # the lines are what a models/*.toml takes
    build = (client.folder / "toy.toml").read_text().partition("[build]")[2]
    toml.write_text("\n".join(said[2:-2]) + "\n[build]" + build)
    source = models.load_model("pasted", client.folder).source
    assert isinstance(source, Source)
    assert (source.repo, source.revision, len(source.files)) == (REPO, REVISION, len(files))
    for pin in source.files:
        content = files[pin.name]
        assert pin.size == len(content)
        assert pin.sha256 == hashlib.sha256(content).hexdigest() or pin.git_blob == git_blob(content)

    assert client.fetch(dead_end, model=REPO) == (0, folder, "")  # nothing is asked, and nothing said, again


def test_a_commit_stays_until_its_pins_are_removed(hub: Hub, client: Client) -> None:
    hub.publish(WHOLE)
    _, out, _ = client.fetch(hub.url, model=REPO)
    hub.revision = 40 * "f"
    hub.publish({**WHOLE, "config.json": b'{"new": 1}'})
    assert client.fetch(hub.url, model=REPO) == (0, out.splitlines()[-1], "")
    kept(client).unlink()
    code, out, _ = client.fetch(hub.url, model=REPO)
    assert code == 0
    assert (Path(out.splitlines()[-1]) / "config.json").read_bytes() == b'{"new": 1}'
    assert hub.asked == ["main", "main"]


def test_a_cut_download_resumes_at_the_same_commit(hub: Hub, client: Client) -> None:
    hub.publish({**WHOLE, "config.json": b"{}"})
    del hub.files["tokenizer.json"]
    code, _, err = client.fetch(hub.url, model=REPO)
    assert code == 2
    assert f"tokenizer.json of {REPO} did not come" in err
    assert f"make build MODEL={REPO} MODEL_DIR=/path/to/toy" in err
    hub.files["tokenizer.json"] = WHOLE["tokenizer.json"]
    code, out, _ = client.fetch(hub.url, model=REPO)
    assert (code, len(out.splitlines())) == (0, 1)
    assert hub.asked == ["main"]


def test_a_file_with_another_digest_is_refused(hub: Hub, client: Client) -> None:
    hub.publish(WHOLE)
    hub.files["model.safetensors"] = b"Weights"
    code, _, err = client.fetch(hub.url, model=REPO)
    assert code == 2
    assert "model.safetensors is not the pinned file" in err


@pytest.mark.parametrize(
    ("status", "fault", "said"),
    [
        (401, "", f"there is no {REPO} at http"),
        (404, "RepoNotFound", "or it is private or gated;\na token that may read it is taken from HF_TOKEN"),
        (403, "GatedRepo", "is gated: accept its terms on its page there"),
        (404, "RevisionNotFound", "has no revision main"),
        (500, "", "does not answer (HfHubHTTPError"),
    ],
)
def test_errors_of_the_hub_come_with_advice(status: int, fault: str, said: str, hub: Hub, client: Client) -> None:
    hub.refusal = (status, fault)
    code, out, err = client.fetch(hub.url, model=REPO)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) <= 3
    assert err.splitlines()[-1] == f"or give a copy: make build MODEL={REPO} MODEL_DIR=/path/to/toy"


@pytest.mark.parametrize("more", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_network(client: Client, dead_end: str, more: dict[str, str]) -> None:
    code, out, err = client.fetch(dead_end, model=REPO, **more)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {REPO} is not pinned yet, and {dead_end} does not answer")
    assert len(err.splitlines()) == 3


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a.Q4_K_M.gguf": b"", "README.md": b""}, "it has 'a.Q4_K_M.gguf, README.md, "),
        (
            {"adapter_config.json": b"", "adapter_model.safetensors": b""},
            "it has 'adapter_model.safetensors, adapter_c",
        ),
        ({}, "it has 'nothing'"),
    ],
)
def test_a_repository_without_weights(files: dict[str, bytes], said: str, hub: Hub, client: Client) -> None:
    hub.publish({**TEXTS, **files} if files else {})
    code, _, err = client.fetch(hub.url, model=REPO)
    assert code == 2
    assert f"error: {REPO} holds no model.safetensors or pytorch_model.bin" in err
    assert said in err
    assert len(err.splitlines()) == 3


@pytest.mark.parametrize(
    "listing",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        json.dumps({"id": REPO, "sha": "main", "siblings": []}).encode(),
        json.dumps(
            {"id": REPO, "sha": REVISION, "siblings": [{"rfilename": "config.json"}, {"rfilename": 3}]}
        ).encode(),
        json.dumps({"id": REPO, "sha": REVISION, "siblings": [{"rfilename": "model.safetensors"}]}).encode(),
        json.dumps(
            {"id": REPO, "sha": REVISION, "siblings": [{"rfilename": "model.safetensors", "blobId": "../../x"}]}
        ).encode(),
        json.dumps(
            {"id": REPO, "sha": REVISION, "siblings": [{"rfilename": "model.safetensors", "blobId": 7}]}
        ).encode(),
        json.dumps({"id": REPO, "sha": REVISION, "siblings": [{"rfilename": f"{n}"} for n in range(2001)]}).encode(),
    ],
)
def test_an_unusable_file_listing(listing: bytes, hub: Hub, client: Client) -> None:
    hub.listing = listing
    code, _, err = client.fetch(hub.url, model=REPO)
    assert code == 2
    assert 1 <= len(err.splitlines()) <= 3
    assert not kept(client).exists()


@pytest.mark.parametrize("text", ["", "[source]", "{", "\xff", '[source]\nrepo = "other/toy"', '[source]\npath = "/"'])
def test_damaged_pins_are_named(text: str, hub: Hub, client: Client) -> None:
    kept(client).parent.mkdir(parents=True)
    kept(client).write_bytes(text.encode("latin-1"))
    code, _, err = client.fetch(hub.url, model=REPO)
    assert code == 2
    assert err.startswith(f"error: {kept(client)}: ")
    assert err.endswith("Remove it and run again: the Hub is asked anew.")


def test_a_copy_of_an_unpinned_repository_is_used_with_a_note(client: Client, dead_end: str, tmp_path: Path) -> None:
    code, out, _ = client.fetch(dead_end, str(tmp_path), model=REPO)
    assert code == 0
    assert out.splitlines() == [
        f"{tmp_path} is taken as it is: no digests of {REPO} are pinned",
        str(tmp_path),
    ]
