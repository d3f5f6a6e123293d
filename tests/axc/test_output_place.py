"""The output folder of a build: existing files, disk space and memory, and no changes after a refusal."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import pytest

from axc import build
from axc.budget import require_memory
from axrun.errors import BadInput
from axrun.format.bundle import read_manifest
from tests.axc.axc import (
    assert_build_refused,
    assert_done,
    assert_refused,
    assert_same_files,
    axc,
    llm_build,
    nothing_changes,
    tree,
)
from tests.axc.conftest import Breakable

# Flags out of range


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kv_cache_len", 0], ["--kv_cache_len is 0", "1 to 1023"]),
        (["--kv_cache_len", -1], ["--kv_cache_len is -1", "1 to 1023"]),
        (["--kv_cache_len", 1024], ["--kv_cache_len is 1024", "1 to 1023", "1024 positions"]),
        (["--kv_cache_len", 10**30], ["--kv_cache_len is 1000"]),
        (["--prefill_len", -1], ["--prefill_len is -1", "0 (no prefill) to --kv_cache_len 127"]),
        (["--prefill_len", 128], ["--prefill_len is 128", "127"]),
        (["--last_kv_cache_len", 16], ["--last_kv_cache_len", "--prefill_len"]),
        (["--prefill_len", 16, "--last_kv_cache_len", 0], ["--last_kv_cache_len is 0", "up to --kv_cache_len 127"]),
        (["--prefill_len", 16, "--last_kv_cache_len", 128], ["--last_kv_cache_len is 128", "127"]),
        (
            ["--prefill_len", 16, "--last_kv_cache_len", 64, "--last_kv_cache_len", 32],
            ["--last_kv_cache_len is 64, 32", "rising"],
        ),
        (["--post_topk", -1], ["--post_topk is -1", "vocabulary"]),
        (["--post_topk", 9999], ["--post_topk is 9999", "vocabulary"]),
        (["--parallel", 0], ["--parallel is 0", "1 to 256"]),
        (["--parallel", 257], ["--parallel is 257", "1 to 256"]),
        (["--model_type", "gpt2"], ["'gpt2' is not supported", "families/"]),
        (["--model_type", "llama"], ["are not of this architecture", "q_proj.bias"]),
        (["--model_config", "nowhere.json"], ["nowhere.json is missing"]),
        (["--model_name", "\udcff"], ["--model_name"]),
    ],
)
def test_flags_out_of_range(pristine: Path, tmp_path: Path, flags: list[object], said: list[str]) -> None:
    assert_build_refused(pristine, tmp_path, *said, flags=flags)


@pytest.mark.parametrize("flags", [["--chip", "AX1"], ["-w", "s3"], ["--kv_cache_len", "many"], ["--frobnicate"]])
def test_invalid_flags(pristine: Path, tmp_path: Path, flags: list[object]) -> None:
    assert_build_refused(pristine, tmp_path, str(flags[-1]), "--help", flags=flags)


# Existing files


def test_a_file_at_the_output_path(pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").write_text("precious")
    with nothing_changes(tmp_path):
        assert_refused(llm_build(pristine, tmp_path / "bundle", "--force"), "bundle holds something", "--output_path")


def test_other_data_at_the_output_path(pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.tex").write_text("precious")
    with nothing_changes(tmp_path):
        assert_refused(llm_build(pristine, tmp_path / "bundle", "--force"), "no bundle", "stays as it is")


def test_an_empty_folder_is_filled(pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    assert_done(llm_build(pristine, tmp_path / "bundle"))
    assert_done(axc("verify", tmp_path / "bundle"))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_the_working_directory_is_filled_or_refused(pristine: Path, tmp_path: Path) -> None:
    """The current directory cannot be replaced; a refusal is fine, a traceback is not."""
    here = tmp_path / "here"
    here.mkdir()
    ended = llm_build(pristine, ".", cwd=here)
    if ended.code:
        assert_refused(ended, "--output_path")
        assert tree(tmp_path) == {"here": "folder"}
    else:
        assert_done(axc("verify", here))


@pytest.mark.parametrize("below", ["file/bundle", "file/new/bundle"])
def test_a_file_in_place_of_a_parent_folder(pristine: Path, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("precious")
    with nothing_changes(tmp_path):
        assert_refused(llm_build(pristine, tmp_path / below), "cannot write", "--output_path")


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_longer_than_the_system_allows(pristine: Path, tmp_path: Path, length: int) -> None:
    with nothing_changes(tmp_path):
        assert_refused(llm_build(pristine, tmp_path / ("b" * length)), "too long")


def test_a_broken_link_is_refused_before_the_work(pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to("nowhere")
    with nothing_changes(tmp_path):
        ended = llm_build(pristine, tmp_path / "bundle")
        assert_refused(ended, "bundle", "--output_path")
        assert "Make room" not in ended.err


def test_a_link_to_a_bundle_stays_a_link(pristine: Path, tmp_path: Path) -> None:
    """`latest -> v1`: after --force the link points to the new bundle, or nothing has changed."""
    assert_done(llm_build(pristine, tmp_path / "v1"))
    (tmp_path / "latest").symlink_to("v1")
    before = tree(tmp_path)
    ended = llm_build(pristine, tmp_path / "latest", "-w", "fp16", "--force")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    if ended.code:
        assert_refused(ended, "link")
        assert tree(tmp_path) == before
    else:
        manifest = json.loads((tmp_path / "latest" / "manifest.json").read_text())
        assert manifest["flags"]["weight_type"] == "fp16"


def test_a_foreign_folder_at_the_staging_path_is_not_emptied(pristine: Path, tmp_path: Path) -> None:
    theirs = tmp_path / ".bundle.building"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("precious")
    ended = llm_build(pristine, tmp_path / "bundle")
    assert (theirs / "notes.txt").read_text() == "precious"
    assert_refused(ended, ".bundle.building")


def test_a_link_at_the_staging_path_is_not_followed(pristine: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "home"
    theirs.mkdir()
    (theirs / "notes.txt").write_text("precious")
    (tmp_path / ".bundle.building").symlink_to(theirs)
    ended = llm_build(pristine, tmp_path / "bundle")
    assert (theirs / "notes.txt").read_text() == "precious"
    assert_refused(ended, ".bundle.building")


# An existing bundle


def test_the_same_build_again_leaves_the_bundle_as_it_is(pristine: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    assert_done(llm_build(pristine, output, "--parallel", 2))
    with nothing_changes(tmp_path):
        again = llm_build(pristine, output)
    assert_done(again)
    assert "nothing to build" in again.out


def test_the_same_build_again_with_model_config(pristine: Path, tmp_path: Path) -> None:
    output, own = tmp_path / "bundle", tmp_path / "own.json"
    shutil.copyfile(pristine / "config.json", own)
    assert_done(llm_build(pristine, output, "--model_config", own))
    with nothing_changes(tmp_path):
        assert_done(llm_build(pristine, output, "--model_config", own))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-w", "s4", "--quantizer", "rtn"], "it has --weight_type s8, this build s4"),
        (["--kv_cache_len", 63], "it has --kv_cache_len 127, this build 63"),
        (["-t", "fp16"], "it has --hidden_state_type bf16, this build fp16"),
        (["--prefill_len", 16, "--last_kv_cache_len", 64], "--last_kv_cache_len none, this build 64; it has --prefill"),
        (["--chip", "AX620E"], "it has --chip AX650, this build AX620E"),
        (["--model_name", "other"], "its model's name is 'qwen2', this build's 'other'"),
    ],
)
def test_a_different_bundle_is_replaced_only_with_force(
    pristine: Path, bundle_of_defaults: Path, tmp_path: Path, flags: list[object], said: str
) -> None:
    output = tmp_path / "bundle"
    shutil.copytree(bundle_of_defaults, output)
    with nothing_changes(tmp_path):
        assert_refused(llm_build(pristine, output, *flags), "holds another bundle", said, "--force", "--output_path")
    assert_done(llm_build(pristine, output, *flags, "--force"))
    assert_done(llm_build(pristine, tmp_path / "fresh", *flags))
    assert_same_files(output, tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "fresh"]


@pytest.fixture(scope="module")
def bundle_of_defaults(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "defaults"
    assert_done(llm_build(pristine, output))
    return output


def test_changed_weights_are_detected(checkpoint: Breakable, bundle_of_defaults: Path, tmp_path: Path) -> None:
    output, folder = tmp_path / "bundle", checkpoint()
    shutil.copytree(bundle_of_defaults, output)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with nothing_changes(tmp_path):
        assert_refused(llm_build(folder, output), "another bundle: model.safetensors has changed since", "--force")


def test_another_compiler_is_detected(
    pristine: Path, bundle_of_defaults: Path, other_compiler: Path, tmp_path: Path
) -> None:
    """With equal version, flags and inputs."""
    output = tmp_path / "bundle"
    assert_done(llm_build(pristine, output, cwd=other_compiler, env={"PYTHONPATH": str(other_compiler)}))
    made, mine = (read_manifest(folder)["tools"] for folder in (output, bundle_of_defaults))
    assert made["axc"] == mine["axc"]
    said = f"axc's sources changed since it was built (digest {made['digest']}, here {mine['digest']})"
    with nothing_changes(tmp_path):
        assert_refused(llm_build(pristine, output), "holds another bundle", said, "--force (make: FORCE=1)")
    assert_done(llm_build(pristine, output, "--force"))
    assert_same_files(output, bundle_of_defaults)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tools": {"axc": "0.1.0"}}, "it was built by another compiler (digest none, here "),
        ({"maker": "pulsar2"}, "its axmodels were made by 'pulsar2'"),
        ({"inputs": {}}, "it was made without config.json; it was made without generation_config.json (and 3 more)"),
        (
            {"text": {"mended_by": "transformers 5.0.0"}},
            "its tokenizer was repaired by 'transformers 5.0.0', installed is",
        ),
        ({"text": {"compared": False}}, "its tokenizer was not compared with transformers', which is now installed"),
        ({"flags": []}, "its manifest does not say what it was made from"),
        (
            {"model": {"name": "qwen2", "model_type": "llama"}},
            "its model's model_type is 'llama', this build's 'qwen2'",
        ),
    ],
)
def test_differences_of_an_existing_bundle_are_named(
    pristine: Path, bundle_of_defaults: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    output = tmp_path / "bundle"
    shutil.copytree(bundle_of_defaults, output)
    manifest = json.loads((output / "manifest.json").read_text())
    (output / "manifest.json").write_text(json.dumps({**manifest, **change}))
    planned = build.plan(build.Options(pristine, output))
    with nothing_changes(tmp_path), pytest.raises(BadInput) as refused:
        build.build(planned)
    assert said in str(refused.value)


@pytest.mark.parametrize("name", ["qwen2_l1.axmodel", "manifest.json", "hf/tokenizer.json"])
def test_a_damaged_bundle_is_not_reused(pristine: Path, bundle_of_defaults: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "bundle"
    shutil.copytree(bundle_of_defaults, output)
    data = bytearray((output / name).read_bytes())
    data[len(data) // 2] ^= 0x10
    (output / name).write_bytes(data)
    with nothing_changes(tmp_path):
        assert_refused(llm_build(pristine, output), "--force")
    assert_done(llm_build(pristine, output, "--force"))
    assert_same_files(output, bundle_of_defaults)


# Disk space and memory


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("most", [0, 10, 5_000, 100_000])
def test_a_disk_that_fills_up(pristine: Path, tmp_path: Path, parallel: int, most: int) -> None:
    """A file size limit makes writes fail like a full disk."""
    limits = {resource.RLIMIT_FSIZE: most}
    words = ("cannot write", "too large", "--output_path")
    assert_build_refused(pristine, tmp_path, *words, flags=("--parallel", parallel), limits=limits)


def test_a_disk_that_fills_up_keeps_the_old_bundle(pristine: Path, bundle_of_defaults: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    shutil.copytree(bundle_of_defaults, output)
    limits = {resource.RLIMIT_FSIZE: 100_000}
    with nothing_changes(tmp_path):
        assert_refused(llm_build(pristine, output, "-w", "fp16", "--force", limits=limits), "cannot write")


def test_a_disk_too_small_is_found_before_work_starts(pristine: Path) -> None:
    """/proc has no free space."""
    started = time.monotonic()
    ended = llm_build(pristine, "/proc/axc/bundle")
    assert_refused(ended, "kB of free disk, the bundle needs 2 MB", "Make room", "--output_path")
    assert "needs 2 MB of disk" in ended.out
    assert time.monotonic() - started < 30


def test_memory_too_small_is_found_before_work_starts(pristine: Path, tmp_path: Path) -> None:
    limits = {resource.RLIMIT_DATA: 200_000_000}
    assert_build_refused(pristine, tmp_path, "ulimit -d allows 200 MB", "the build needs 4", "Raise it", limits=limits)


def test_a_build_that_needs_more_memory_than_any_machine(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"MB of memory are available, 2 processes need .*\n.*lower --parallel"):
        require_memory(1 << 60, processes=2)


def test_the_budget_is_enough(pristine: Path, tmp_path: Path) -> None:
    """The build succeeds with the estimated memory as `ulimit -d`."""
    limits = {resource.RLIMIT_DATA: 440_000_000}
    assert_done(llm_build(pristine, tmp_path / "bundle", "--parallel", 2, limits=limits))


# Streams


def test_a_full_disk_behind_standard_output(pristine: Path, tmp_path: Path) -> None:
    with nothing_changes(tmp_path), Path("/dev/full").open("w") as full:
        assert_refused(llm_build(pristine, tmp_path / "bundle", stdout=full), "No space left")


def test_a_report_that_cannot_be_written(pristine: Path, tmp_path: Path) -> None:
    report = tmp_path / "nowhere" / "report.json"
    assert_refused(
        llm_build(pristine, tmp_path / "bundle", "--check_level", 0, "--check_report", report), str(report), "No such"
    )
