"""Installing the chat page's libraries from a folder of archives, without a network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest

from requirements import page
from requirements.install import SetupFailed

FILES = {
    "dompurify-1.0.0.tgz": {"package/dist/purify.es.mjs": b"export default 1;", "package/LICENSE": b"as is"},
    "markdown-it-2.0.0.tgz": {
        "package/dist/browser/markdown-it.esm.min.mjs": b"export default 2;",
        "package/dist/other.js": b"not needed",
        "package/LICENSE": b"MIT",
        "package/../../LICENSE": b"outside",
    },
    "mdurl-3.0.0.tgz": {"package/LICENSE.md": b"MIT", "package/deep/LICENSE": b"another's"},
}


def archive(files: dict[str, bytes]) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        link = tarfile.TarInfo("package/LICENSE.link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return written.getvalue()


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of archives, set as WHEELS; npm is not on the PATH."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, files in FILES.items():
        (folder / name).write_bytes(archive(files))
    monkeypatch.setenv("WHEELS", str(folder))
    monkeypatch.setenv("PATH", str(tmp_path))
    return folder


@pytest.fixture
def lock(wheels: Path, tmp_path: Path) -> Path:
    entries: dict[str, dict[str, object]] = {"": {"dependencies": {}}}
    for path in sorted(wheels.iterdir()):
        name, _, version = path.name.removesuffix(".tgz").rpartition("-")
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        entries[f"node_modules/{name}"] = {"version": version, "integrity": f"sha512-{digest}"}
    entries["node_modules/tested-with"] = {"version": "1.0.0", "integrity": "sha512-x", "dev": True}
    entries["node_modules/@types/x"] = {"version": "1.0.0", "integrity": "sha512-x", "optional": True}
    (tmp_path / "lock.json").write_text(json.dumps({"packages": entries}))
    return tmp_path / "lock.json"


def held(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_archives_in_a_local_folder_suffice(lock: Path, tmp_path: Path) -> None:
    lib = tmp_path / "page" / "lib"
    page.bring(tmp_path / "venv", lock, lib)
    found = held(lib)
    assert re.fullmatch(r"[0-9a-f]{64}", found.pop("made-from").decode())
    assert found == {
        "purify.js": b"export default 1;",
        "markdown-it.js": b"export default 2;",
        "licences/dompurify-LICENSE.txt": b"as is",
        "licences/markdown-it-LICENSE.txt": b"MIT",
        "licences/mdurl-LICENSE.txt": b"MIT",
    }
    assert os.listdir(lib.parent) == ["lib"]


def test_an_environment_is_reused_until_the_lock_changes(
    lock: Path, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lib = tmp_path / "lib"
    page.bring(tmp_path / "venv", lock, lib)
    assert "dompurify 1.0.0, markdown-it 2.0.0, mdurl 3.0.0" in capsys.readouterr().out
    for path in wheels.iterdir():
        path.unlink()
    page.bring(tmp_path / "venv", lock, lib)
    assert capsys.readouterr().out == ""
    before = held(lib)
    lock.write_text(lock.read_text() + "\n")
    with pytest.raises(SetupFailed):
        page.bring(tmp_path / "venv", lock, lib)
    assert held(lib) == before


def test_an_archive_with_another_digest_is_refused(lock: Path, wheels: Path, tmp_path: Path) -> None:
    (wheels / "mdurl-3.0.0.tgz").write_bytes(archive({"package/LICENSE": b"MIT, and more"}))
    with pytest.raises(SetupFailed, match=r"mdurl-3\.0\.0\.tgz is not the file that was locked: its sha512 is "):
        page.bring(tmp_path / "venv", lock, tmp_path / "lib")
    assert not (tmp_path / "lib").exists()


@pytest.mark.parametrize("fails", ["no npm", "npm fails"])
def test_one_error_names_the_archives_and_the_remedy(
    fails: str, lock: Path, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("dompurify-1.0.0.tgz", "mdurl-3.0.0.tgz"):
        (wheels / name).unlink()
    if fails == "npm fails":
        (tmp_path / "npm").write_text(
            "#!/bin/sh\necho 'npm error code E503' >&2\necho 'npm error it is down' >&2\nexit 1\n"
        )
        (tmp_path / "npm").chmod(0o755)
    else:  # the set `page` cannot be installed either
        monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SetupFailed) as error:
        page.bring(tmp_path / "venv", lock, tmp_path / "lib")
    first, second = str(error.value).splitlines()
    assert first.startswith("the page's libraries did not come: ")
    assert fails == "no npm" or first.endswith("npm error it is down")
    names = "dompurify-1.0.0.tgz mdurl-3.0.0.tgz"
    assert second == f"connect this machine, or put {names} into a folder and name it: WHEELS=folder"


def test_a_package_with_another_hash_than_the_lock_is_an_error(lock: Path, wheels: Path, tmp_path: Path) -> None:
    changed = archive({"package/dist/new-place.mjs": b"export default 1;", "package/LICENSE": b"as is"})
    (wheels / "dompurify-1.0.0.tgz").write_bytes(changed)
    entries = json.loads(lock.read_text())
    digest = base64.b64encode(hashlib.sha512(changed).digest()).decode()
    entries["packages"]["node_modules/dompurify"]["integrity"] = f"sha512-{digest}"
    lock.write_text(json.dumps(entries))
    with pytest.raises(SetupFailed, match=r"dompurify-1\.0\.0\.tgz has no dist/purify\.es\.mjs"):
        page.bring(tmp_path / "venv", lock, tmp_path / "lib")


def test_the_lock_names_exact_versions_with_hashes_and_no_registry() -> None:
    package = json.loads((page.LOCK.parent / "package.json").read_text())
    wanted = package["dependencies"]
    entries = json.loads(page.LOCK.read_text())["packages"]
    assert {name: entries[f"node_modules/{name}"]["version"] for name in wanted} == wanted
    assert set(page.MODULES) == set(wanted)
    assert set(page.TEST_MODULES) == set(package["devDependencies"])
    assert [found.name for found in page.locked(page.LOCK, dev=True)] == [*page.TEST_MODULES]
    for name, entry in entries.items():
        assert not name or re.fullmatch(r"sha512-[A-Za-z0-9+/]{86}==", entry["integrity"])
        assert "resolved" not in entry
