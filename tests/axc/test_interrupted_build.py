"""Interrupted builds: after a signal nothing is left; after a kill the next build continues from finished layers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.axc.axc import (
    INTERRUPTED,
    ROOT,
    Ended,
    assert_done,
    assert_refused,
    assert_same_files,
    axc,
    command,
    environment,
    llm_build,
    tree,
)

FLAGS = ("--check_level", "-1", "-w", "s4", "--quantizer", "rtn")
PATIENCE = 300  # timeout in seconds

Build = subprocess.Popen[str]


@contextmanager
def building(checkpoint: Path, output: Path, parallel: int, compiler: Path = ROOT) -> Iterator[Build]:
    """A running build by the checkout `compiler`, in its own process group as if started by a shell."""
    arguments = ("llm_build", "--input_path", checkpoint, "--output_path", output, *FLAGS, "--parallel", parallel)
    process = subprocess.Popen(
        command(*arguments),
        cwd=compiler,
        env=environment({"PYTHONPATH": str(compiler)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ended(process: Build) -> Ended:
    out, err = process.communicate(timeout=PATIENCE)
    return Ended(process.returncode, out, err)


def wait_until(condition: Callable[[], bool], what: str, process: Build | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        assert process is None or process.poll() is None, f"ended before {what}: {process and process.communicate()}"
        time.sleep(0.002)


def staging(output: Path) -> Path:
    return output.with_name(f".{output.name}.building")


def finished(output: Path) -> dict[str, tuple[int, int]]:
    """Finished layers in the staging folder: inode and modification time by name."""
    done = [path.with_suffix("") for path in staging(output).glob("*_l*.axmodel.done")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done}


def wait_for_layers(process: Build, output: Path, count: int = 3) -> None:
    wait_until(lambda: len(finished(output)) >= count, f"{count} layers", process)


def children(process: Build) -> list[int]:
    """Pids of the child processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended while we looked
        if parent == process.pid:
            found.append(int(stat.parent.name))
    return found


def workers(process: Build) -> list[int]:
    """Pids of the worker processes that compile."""
    found = []
    for pid in children(process):
        with suppress(OSError):  # it ended while we looked
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def assert_all_end(pids: list[int]) -> None:
    assert pids
    wait_until(lambda: not any(alive(pid) for pid in pids), "the worker processes to end")


def assert_interrupted(result: Ended) -> None:
    assert (result.code, result.err) == (INTERRUPTED, "\ninterrupted\n"), result


def resume(checkpoint: Path, output: Path, taken_over: dict[str, tuple[int, int]]) -> None:
    """Runs the same command again: it succeeds, and does not write the finished layers again."""
    assert taken_over
    assert_done(llm_build(checkpoint, output, "-w", "s4", "--quantizer", "rtn", "--parallel", 2))
    now = {name: ((output / name).stat().st_ino, (output / name).stat().st_mtime_ns) for name in taken_over}
    assert now == taken_over
    assert_done(axc("verify", output))
    assert not staging(output).exists()


@pytest.fixture(scope="module")
def uninterrupted(many_layers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "whole"
    assert_done(llm_build(many_layers, output, "-w", "s4", "--quantizer", "rtn"))
    return output


# Signals


@pytest.mark.parametrize("to_group", [False, True], ids=["process", "group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("parallel", [1, 2])
def test_a_signal_in_the_middle_leaves_nothing(
    many_layers: Path, tmp_path: Path, parallel: int, number: signal.Signals, to_group: bool
) -> None:
    """Ctrl-C goes to the whole process group; `kill` and a service manager's stop go to one or to all."""
    output = tmp_path / "new" / "parents" / "bundle"
    with building(many_layers, output, parallel) as process:
        wait_for_layers(process, output)
        started = children(process)
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert_interrupted(ended(process))
    assert tree(tmp_path) == {}
    if parallel > 1:
        assert_all_end(started)


@pytest.mark.parametrize("pause", [0.0, 0.05, 0.2])
def test_ctrl_c_while_workers_start(many_layers: Path, tmp_path: Path, pause: float) -> None:
    """Workers are still importing; users often notice a wrong flag then."""
    output = tmp_path / "bundle"
    with building(many_layers, output, 2) as process:
        wait_until(lambda: len(workers(process)) == 2, "two workers", process)
        started = children(process)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGINT)
        assert_interrupted(ended(process))
    assert tree(tmp_path) == {}
    assert_all_end(started)


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_ctrl_c_again_and_again(many_layers: Path, tmp_path: Path, pause: float) -> None:
    output = tmp_path / "bundle"
    with building(many_layers, output, 2) as process:
        wait_for_layers(process, output)
        started = children(process)
        for _ in range(10):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                time.sleep(pause)
        assert_interrupted(ended(process))
    assert tree(tmp_path) == {}
    assert_all_end(started)


def test_a_signal_keeps_the_bundle_that_was_to_be_replaced(many_layers: Path, pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    assert_done(llm_build(pristine, output))
    before = tree(tmp_path)
    arguments = ("llm_build", "--input_path", many_layers, "--output_path", output, *FLAGS, "--force")
    process = subprocess.Popen(command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_layers(process, output)
    process.terminate()
    _, err = process.communicate(timeout=PATIENCE)
    assert_interrupted(Ended(process.returncode, "", err))
    assert tree(tmp_path) == before


# Killed


@pytest.mark.parametrize("parallel", [1, 2])
def test_the_same_command_resumes_after_kill_9(
    many_layers: Path, tmp_path: Path, uninterrupted: Path, parallel: int
) -> None:
    output = tmp_path / "bundle"
    with building(many_layers, output, parallel) as process:
        wait_for_layers(process, output)
        started = children(process)
        process.kill()
        process.wait(PATIENCE)
        if parallel > 1:
            assert_all_end(started)
    assert not output.exists()
    resume(many_layers, output, finished(output))
    assert_same_files(output, uninterrupted)


def test_files_of_another_compiler_are_not_reused(
    many_layers: Path, tmp_path: Path, uninterrupted: Path, other_compiler: Path
) -> None:
    output = tmp_path / "bundle"
    with building(many_layers, output, 1, other_compiler) as process:
        wait_for_layers(process, output)
        process.kill()
        process.wait(PATIENCE)
    assert finished(output)
    assert_done(llm_build(many_layers, output, "-w", "s4", "--quantizer", "rtn", "--parallel", 2))
    assert_same_files(output, uninterrupted)


def test_killed_twice(many_layers: Path, tmp_path: Path, uninterrupted: Path) -> None:
    output = tmp_path / "bundle"
    for count in (2, 6):
        with building(many_layers, output, 2) as process:
            wait_for_layers(process, output, count)
            started = children(process)
            process.kill()
            process.wait(PATIENCE)
            assert_all_end(started)
    resume(many_layers, output, finished(output))
    assert_same_files(output, uninterrupted)


def test_a_damaged_finished_file_is_rebuilt(many_layers: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """After a power cut, a file recorded as complete may be empty or full of zeros."""
    output = tmp_path / "bundle"
    with building(many_layers, output, 1) as process:
        wait_for_layers(process, output)
        process.kill()
        process.wait(PATIENCE)
    first, second, *_ = sorted(finished(output))
    os.truncate(staging(output) / first, 0)
    (staging(output) / second).write_bytes(bytes((staging(output) / second).stat().st_size))
    assert_done(llm_build(many_layers, output, "-w", "s4", "--quantizer", "rtn"))
    assert_same_files(output, uninterrupted)


def test_files_built_with_other_flags_are_not_reused(many_layers: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    with building(many_layers, output, 1) as process:
        wait_for_layers(process, output)
        process.kill()
        process.wait(PATIENCE)
    assert_done(llm_build(many_layers, output, "-w", "s8"))
    assert_done(llm_build(many_layers, tmp_path / "fresh", "-w", "s8"))
    assert_same_files(output, tmp_path / "fresh")


def test_a_killed_worker_is_reported_and_finished_files_are_kept(
    many_layers: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    """As by the kernel when memory runs out."""
    output = tmp_path / "bundle"
    with building(many_layers, output, 2) as process:
        wait_for_layers(process, output)
        started = children(process)
        os.kill(workers(process)[0], signal.SIGKILL)
        assert_refused(ended(process), "worker process was killed", "memory", "lower --parallel", "kept")
        assert_all_end(started)
    assert not output.exists()
    resume(many_layers, output, finished(output))
    assert_same_files(output, uninterrupted)


# Concurrent builds


def test_a_second_build_of_the_same_bundle_is_refused(many_layers: Path, tmp_path: Path, uninterrupted: Path) -> None:
    output = tmp_path / "bundle"
    with building(many_layers, output, 1) as process:
        wait_for_layers(process, output, 1)
        process.send_signal(signal.SIGSTOP)  # or it might be done before the second one starts
        second = llm_build(many_layers, output, "-w", "s4", "--quantizer", "rtn")
        process.send_signal(signal.SIGCONT)
        first = ended(process)
    assert_refused(second, "another process is building", "bundle", "Wait")
    assert_done(first)
    assert_same_files(output, uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_builds_of_different_bundles_are_independent(many_layers: Path, tmp_path: Path, uninterrupted: Path) -> None:
    with (
        building(many_layers, tmp_path / "one", 1) as first,
        building(many_layers, tmp_path / "two", 1) as second,
    ):
        assert_done(ended(first))
        assert_done(ended(second))
    assert_same_files(tmp_path / "one", uninterrupted)
    assert_same_files(tmp_path / "two", uninterrupted)


def test_many_builds_of_one_bundle_at_the_same_moment(pristine: Path, tmp_path: Path) -> None:
    """Each builds the bundle, finds it built, or is refused; there are no tracebacks in races."""
    output = tmp_path / "bundle"
    arguments = ("llm_build", "--input_path", pristine, "--output_path", output, "--check_level", "-1")
    for _ in range(2):
        processes = [
            subprocess.Popen(command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
            for _ in range(8)
        ]
        results = [Ended(process.wait(PATIENCE), "", process.communicate()[1]) for process in processes]
        assert 0 in [result.code for result in results]
        for result in results:
            if result.code:
                assert_refused(result, "bundle")
        assert_done(axc("verify", output))
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
        shutil.rmtree(output)
