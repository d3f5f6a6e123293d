"""`make build` in and out of the container: same bytes, file owners, the choice and its reason, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from axrun.command import INTERRUPTED
from axrun.errors import BadInput, CheckFailed
from axrun.format.bundle import verify
from ci.container import base, compare, engine, image
from tests.container.conftest import ROOT, invoke

NOWHERE = "unix:///nowhere/docker.sock"
system = pytest.mark.system
WAIT_SECONDS = 300


def in_container(client: docker.DockerClient, axc: str, command: str, folder: Path, **options: object) -> int:
    """Runs a shell command in the image; `folder` is its working directory and the only writable path."""
    return engine.run(
        client,
        axc,
        ["sh", "-c", command],
        reads={ROOT: Path("/axc")},
        writes={folder: folder},
        folder=folder,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture
def without_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", NOWHERE)


@pytest.mark.usefixtures("without_daemon")
def test_without_a_daemon_the_build_runs_in_this_process() -> None:
    reason = f"no Docker daemon answers at {NOWHERE}: No such file or directory"
    assert str(engine.choose("auto")) == f"engine: local ({reason})"
    assert str(engine.choose("local")) == "engine: local (asked for)"
    with pytest.raises(BadInput, match=re.escape(reason)):
        engine.choose("docker")


@pytest.mark.usefixtures("without_daemon")
def test_an_unknown_engine_or_backend_lists_the_known_ones() -> None:
    for words, said in (
        (["--engine", "podman"], "error: ENGINE is 'podman'; expected one of auto, docker, local"),
        (["--backend", "tpu"], "error: BACKEND is 'tpu'; expected one of cpu, pulsar2"),
        (["--backend", "pulsar2"], f"error: no Docker daemon answers at {NOWHERE}: No such file or directory"),
    ):
        done = invoke("build", *words)
        assert (done.returncode, done.stderr.splitlines()[0]) == (2, said)


def test_the_context_depends_on_content_only(tmp_path: Path) -> None:
    contexts: list[bytes] = []
    for name, mask in (("a", 0o022), ("b", 0o077)):
        before = os.umask(mask)
        try:
            for path, text in {
                "Dockerfile": "FROM x",
                ".dockerignore": "*\n!code",
                "code/a.py": "1",
                "secret": "2",
            }.items():
                (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name / path).write_text(text)
            os.utime(tmp_path / name / "code", (0, len(contexts)))
        finally:
            os.umask(before)
        with (tmp_path / f"{name}.tar").open("wb") as out:
            image.context(out, tmp_path / name)
        contexts.append((tmp_path / f"{name}.tar").read_bytes())
    assert contexts[0] == contexts[1]
    assert b"code/a.py" in contexts[0]
    assert b"secret" not in contexts[0]


class TestInTheContainer:
    pytestmark = system

    def test_a_bundle_has_the_same_bytes_with_and_without_the_container(self, axc: str, tmp_path: Path) -> None:
        said = {}
        for name in ("docker", "local"):
            done = invoke("build", "--engine", name, "--out", str(tmp_path / name), "--parallel", "2")
            assert done.returncode == 0, done.stdout + done.stderr
            said[name] = done.stdout.splitlines()
            assert said[name][0].startswith(f"engine: {name} (")
            assert re.search(r"^  compiled +2$", done.stdout, re.M)
        assert list(compare.folders(*(tmp_path / name / "tiny-qwen2" for name in said))) == []
        verify(tmp_path / "docker" / "tiny-qwen2")

    def test_a_ready_image_is_used_by_default(self, client: docker.DockerClient, axc: str) -> None:
        assert re.fullmatch(r"engine: docker \(image axc:latest [0-9a-f]{12}\)", str(engine.choose("auto")))
        ours = client.images.get(axc)
        try:
            client.images.get(base.TAG).tag(axc)  # an image with that name but from other locks
            assert str(engine.choose("auto")).startswith("engine: local (Docker has no image with the current locks")
        finally:
            ours.tag(axc)
        assert engine.choose("auto").client is not None

    def test_files_it_writes_belong_to_the_caller(self, client: docker.DockerClient, axc: str, tmp_path: Path) -> None:
        os.chown(tmp_path, 12345, 54321)
        assert in_container(client, axc, "mkdir a && echo hi >a/b && touch /tmp/c", tmp_path, user=(12345, 54321)) == 0
        assert {(path.stat().st_uid, path.stat().st_gid) for path in tmp_path.rglob("*")} == {(12345, 54321)}
        assert in_container(client, axc, "touch mine", tmp_path) == 0
        assert (tmp_path / "mine").stat().st_uid == os.getuid()

    def test_it_has_no_network_and_a_read_only_checkout(
        self, client: docker.DockerClient, axc: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        assert in_container(client, axc, "ls /sys/class/net; touch /axc/new; exit 7", tmp_path) == 7
        out, err = capfdbinary.readouterr()
        assert out.split() == [b"lo"]
        assert b"Read-only file system" in err
        assert not (ROOT / "new").exists()

    def test_ctrl_c_stops_the_container_and_leaves_nothing(
        self, client: docker.DockerClient, axc: str, tmp_path: Path
    ) -> None:
        checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
        synth = ["-m", "axc", "synth", "--model", "qwen2-0.5b", "--output_path", str(checkpoint)]
        subprocess.run([sys.executable, *synth], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
        words = ["--engine", "docker", "--out", str(out), "--args", f"--input_path {checkpoint} --check_level -1"]
        build = subprocess.Popen(
            [sys.executable, "-m", "invoke", "build", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert build.stdout
        for line in build.stdout:
            if line.startswith("prepare done"):  # printed in the container, long before the build ends
                break
        build.send_signal(signal.SIGINT)
        rest = build.stdout.read()
        assert build.wait(WAIT_SECONDS) == INTERRUPTED, rest
        assert "Traceback" not in rest
        assert client.containers.list(all=True, filters={"label": f"{engine.LABEL}={build.pid}"}) == []
        assert [path.name for path in out.rglob("*")] == []

    def test_a_killed_container_is_reported(self, client: docker.DockerClient, axc: str, tmp_path: Path) -> None:
        with pytest.raises(CheckFailed, match="was killed, perhaps out of memory\nLower PARALLEL"):
            in_container(client, axc, "sh -c 'kill -KILL $$'", tmp_path)

    def test_a_remote_daemon_is_not_used(self, client: docker.DockerClient, forwarded: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCKER_HOST", forwarded)
            assert str(engine.choose("auto")).endswith("is on another machine)")
            with pytest.raises(BadInput, match="cannot mount this machine's folders"):
                engine.choose("docker")

    @pytest.fixture
    def forwarded(self, client: docker.DockerClient) -> Iterator[str]:
        """The daemon's socket, forwarded from a local TCP port."""
        socket = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
        code = (
            "import socket,socketserver,sys,threading,shutil\n"
            "class H(socketserver.StreamRequestHandler):\n"
            "  def handle(self):\n"
            "    s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "    def pump(a,b):\n"
            "      while d:=a.recv(65536): b.sendall(d)\n"
            "    threading.Thread(target=pump,args=(s,self.request),daemon=True).start(); pump(self.request,s)\n"
            "t=socketserver.ThreadingTCPServer(('127.0.0.1',0),H); t.daemon_threads=True\n"
            "print(t.server_address[1],flush=True); t.serve_forever()\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code, socket], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout
            yield f"tcp://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()
            process.wait()
