"""llm_build: compiles a checkpoint to a bundle, layers in parallel."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

from axc import budget, bundle, config, existing, hf_folder, identity, jobs, pooling
from axc.axmodel.writer import Written
from axc.calibration.file import CalibrationFile
from axc.checkpoints import EMBEDDING, HEAD, Checkpoint, Lora, StoredTensor
from axc.compile import Target, weights
from axc.existing import CALIBRATION, MODEL_CONFIG, as_json
from axc.families.family import ModelConfig
from axc.jobs import Job, Work
from axc.quantizer import WEIGHT_TYPES
from axc.quantizer.kept import Kept, decide
from axc.staging import KeepStaging, publish, refuse_other_content, staged_bytes, staging
from axc.weights import Source
from axc.weights.sources import run_of_rows
from axrun.errors import BadInput
from axrun.format.bundle import MANIFEST, sha256
from axrun.format.dtypes import FLOATS

CHIPS = ("AX620E", "AX650")
MAX_CONTEXT = 1 << 20  # positions: eight times the longest context of these families


@dataclass(frozen=True)
class Options:
    """The user's flags, with the names, meanings and defaults of the vendor's `llm_build`."""

    input_path: Path
    output_path: Path
    prefill_len: int = 0
    parallel: int = 1
    model_config: Path | None = None
    model_type: str | None = None
    kv_cache_len: int = 127
    post_topk: int = 0
    post_weight_type: str | None = None  # None: the stored type, s8 if that is a float type
    hidden_state_type: str = "bf16"
    weight_type: str | None = None
    chip: str = "AX650"
    last_kv_cache_len: tuple[int, ...] = ()
    ret_postnorm: bool = False
    vendor: tuple[str, ...] = ()  # flags for the vendor's compiler alone: axc.vendor_flags
    model_name: str | None = None
    calibrated: Path | None = None
    calibrated_sha256: str | None = None  # expected digest of `calibrated`
    force: bool = False
    lora: tuple[Lora, ...] = ()

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("--hidden_state_type", self.hidden_state_type, tuple(FLOATS)),
            ("--weight_type", self.weight_type, tuple(WEIGHT_TYPES)),
            ("--post_weight_type", self.post_weight_type, tuple(WEIGHT_TYPES)),
            ("--chip", self.chip, CHIPS),
        ):
            if value is not None and value not in allowed:
                raise BadInput(f"{flag} is {value!r}; expected one of {', '.join(allowed)}")
        if not 1 <= self.parallel <= 256:
            raise BadInput(f"--parallel is {self.parallel}; expected 1 to 256")
        name = self.model_name
        if name is not None and not (0 < len(name) <= 200 and name.isprintable() and name.isascii()):
            raise BadInput(f"--model_name is {name!a:.60}; expected printable ASCII, at most 200 characters")
        previous = 0
        for length in self.last_kv_cache_len:
            if not self.prefill_len:
                raise BadInput("--last_kv_cache_len needs --prefill_len: it adds groups that prefill after a history")
            if not previous < length <= self.kv_cache_len:
                raise BadInput(
                    f"--last_kv_cache_len is {', '.join(map(str, self.last_kv_cache_len))}; expected rising numbers "
                    f"up to --kv_cache_len {self.kv_cache_len}"
                )
            previous = length

    def target(self, model: ModelConfig, weight_type: str = "s8", post_weight_type: str = "s8") -> Target:
        """The compilation target, its lengths checked against the model's. Raises BadInput."""
        context = min(model.context, MAX_CONTEXT)
        if not 1 <= self.kv_cache_len < context:
            window = ", its sliding_window" if context == model.sliding_window else ""
            raise BadInput(
                f"--kv_cache_len is {self.kv_cache_len}; expected 1 to {context - 1}: "
                f"the model has {context} positions{window}, one of them for the current token"
            )
        if not 0 <= self.prefill_len <= self.kv_cache_len:
            raise BadInput(
                f"--prefill_len is {self.prefill_len}; expected 0 (no prefill) to --kv_cache_len {self.kv_cache_len}"
            )
        if not 0 <= self.post_topk <= model.vocab_size:
            raise BadInput(f"--post_topk is {self.post_topk}; expected 0 (off) to the vocabulary's {model.vocab_size}")
        return Target(
            prefill_len=self.prefill_len,
            kv_cache_len=self.kv_cache_len,
            last_kv_cache_len=self.last_kv_cache_len,
            hidden_state_type=self.hidden_state_type,
            weight_type=weight_type,
            post_weight_type=post_weight_type,
            post_topk=self.post_topk,
            chip=self.chip,
            ret_postnorm=self.ret_postnorm,
            vendor=self.vendor,
        )


@dataclass(frozen=True)
class Plan:
    """A build ready to start: every dimension checked, every file known by name and size.

    `notices` tell the user what was ignored or overridden in the checkpoint's files. `kept` are the matrices that the
    checkpoint or `calibration` has already quantised. `pooled`: how an embedding model pools.
    """

    options: Options
    checkpoint: Checkpoint
    config: ModelConfig
    target: Target
    inputs: tuple[Path, ...]
    jobs: tuple[Job, ...]
    budget: budget.Budget
    notices: tuple[str, ...] = ()
    kept: Mapping[str, Kept] = field(default_factory=dict)
    calibration: CalibrationFile | None = None
    pooled: pooling.Pooling | None = None

    @property
    def name(self) -> str:
        return self.options.model_name or self.config.model_type

    @property
    def output(self) -> Path:
        """The bundle's path with symbolic links resolved, so that they are not replaced."""
        return Path(os.path.realpath(self.options.output_path))

    @property
    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Detects changed inputs without reading them: (name, bytes, ctime in ns).

        Not mtime: extracting an archive restores it, and reproducible archives have the same mtime for every file.
        """
        more = [self.options.model_config, self.options.calibrated]
        files = [*self.inputs, *(path for path in more if path)]
        return tuple((path.name, path.stat().st_size, path.stat().st_ctime_ns) for path in files)


class Built(NamedTuple):
    """A bundle's manifest; `fresh` is False if the bundle already existed."""

    manifest: dict[str, Any]
    fresh: bool


def plan(options: Options) -> Plan:
    """Plans a build from the headers of the checkpoint. Writes nothing. Raises BadInput."""
    notices: list[str] = []
    checkpoint = Checkpoint.open(options.input_path, options.lora)
    model = config.load(checkpoint, options.model_config, options.model_type, notices.append)
    checkpoint = checkpoint.tied() if model.tie_word_embeddings else checkpoint
    calibration = _calibration(options, checkpoint, model)
    asked = calibration.weight_type if calibration else options.weight_type
    calibrated = calibration.weights if calibration else ()
    types, kept, notes = stored_types(checkpoint, model, asked, options.post_weight_type, calibrated)
    notices += notes
    if calibration:
        kept |= calibration.kept()
        notices.append(f"calibrated: {len(calibration.weights)} matrices, {calibration.bits:g} bits per weight")
    pooled = None if checkpoint.gguf else pooling.read(checkpoint.path, model.hidden_size)
    target = options.target(model, *types)
    if pooled:
        notices += [f"an embedding model, {pooled.mode} pooling: built with --ret_postnorm", *pooled.remarks]
        target = replace(target, ret_postnorm=True)
    turns = getattr(model, "rope", None)
    if turns and turns.long(target.positions):
        original = turns.original_max_position_embeddings
        notices.append(
            f"rope: long_factor at all positions: a context of {target.positions} is beyond the original {original}; "
            f"short_factor with --kv_cache_len up to {original - 1}"
        )
    inputs = bundle.input_files(checkpoint)
    memory = budget.memory(model, target) + budget.reordered(model, kept)
    proof = budget.proof(hf_folder.tokenizer_bytes(checkpoint.folder))
    budget.require_memory(memory, options.parallel, proof)  # jobs.plan allocates the rotary tables
    planned = jobs.plan(Work(checkpoint.path, (), Path(), model, target, kept, options.lora), inputs)
    texts = sum(path.stat().st_size for path in hf_folder.input_files(checkpoint.folder))
    small = 2 * texts  # copies, and files converted from them
    disk = sum(job.nbytes for job in planned if job.kind != "input") + small + (1 << 20)
    needs = budget.Budget(disk, memory, options.parallel, proof)
    return Plan(
        options, checkpoint, model, target, inputs, tuple(planned), needs, tuple(notices), kept, calibration, pooled
    )


def _calibration(options: Options, checkpoint: Checkpoint, model: ModelConfig) -> CalibrationFile | None:
    """The given calibration file, verified against the checkpoint. Raises BadInput."""
    if options.calibrated is None:
        return None
    found = CalibrationFile.open(options.calibrated)
    if options.calibrated_sha256 not in (None, found.sha256):
        raise BadInput(
            f"{options.calibrated} has sha256 {found.sha256}; "
            f"--calibrated_sha256 is {options.calibrated_sha256!a:.66}\n"
            "Get the right file, or calibrate again and give the new digest."
        )
    if options.weight_type not in (None, found.weight_type):
        raise BadInput(
            f"--weight_type is {options.weight_type}, {options.calibrated} holds {found.weight_type}\n"
            "Leave --weight_type out, or calibrate again."
        )
    found.require(checkpoint, weights(model))
    return found.with_head_in(options.post_weight_type)


def stored_types(
    checkpoint: Checkpoint,
    model: ModelConfig,
    weight_type: str | None,
    post_weight_type: str | None,
    calibrated: Collection[str] = (),
) -> tuple[tuple[str, str], dict[str, Kept], list[str]]:
    """Both weight types, the matrices that keep their quantised values, and notes for the user. Raises BadInput.

    `checkpoint` must be `tied` if the model is.
    """
    if not any(tensor.packed for tensor in checkpoint.tensors.values()):
        return (weight_type or "s8", post_weight_type or "s8"), {}, []
    head = EMBEDDING if model.tie_word_embeddings else HEAD
    stored = {name: _stored(checkpoint, source) for name, source in weights(model).items() if len(source.shape) == 2}
    layers = {name: tensor for name, tensor in stored.items() if name not in (EMBEDDING, HEAD)}
    one, kept, notes = decide("--weight_type", weight_type, layers, calibrated)
    other, kept_head, more = decide("--post_weight_type", post_weight_type, {head: stored[head]}, calibrated)
    kept |= kept_head
    runs = {name: run_of_rows(weights(model)[name]) for name in kept}
    return (one, other), {name: replace(kept[name], start=run[1]) for name, run in runs.items() if run}, [*notes, *more]


def _stored(checkpoint: Checkpoint, source: Source) -> StoredTensor:
    """The stored tensor of a weight; without its quantisation grid unless the weight is rows of it, unchanged."""
    first = checkpoint.tensors[next(iter(source.reads))]
    return first if run_of_rows(source) else replace(first, grid=None)


Progress = Callable[[Job], None]
Say = Callable[[str], None]


def build(planned: Plan, progress: Progress = lambda job: None, say: Say = lambda line: None) -> Built:
    """Builds the bundle; an existing, identical and complete one is left as it is.

    `progress(job)` is called at the end of each job, `say` with a remark on each repaired or unusual text file. Raises
    BadInput, and removes all files first.
    """
    output = planned.output
    try:
        found = existing.find(planned)
        if found.manifest is not None:
            return Built(found.manifest, fresh=False)
        if planned.options.output_path.is_symlink() and not output.exists():
            raise BadInput(f"{planned.options.output_path} is a broken link\nChoose another --output_path.")
        refuse_other_content(output, found.reason, force=planned.options.force)
        budget.require_disk(planned.budget.disk - staged_bytes(output), output)
        return Built(_build(planned, output, progress, say), fresh=True)
    except OSError as error:
        raise BadInput(
            f"cannot write {error.filename or output}: {error.strerror or error}\n"
            "Nothing was kept. Make room, or choose another --output_path."
        ) from None


def refuse_before_calibration(planned: Plan, algorithm: Mapping[str, Any], text: str) -> None:
    """Raises BadInput if the output path has something that `build` will refuse once it has calibrated.

    `planned` is without the calibration; `algorithm` and `text` as in `existing.before_calibration`.
    """
    try:
        found = existing.before_calibration(planned, algorithm, text)
        if found or not (planned.output / MANIFEST).is_file():
            refuse_other_content(planned.output, found, force=planned.options.force)
    except OSError:
        return  # `build` says what


def _build(planned: Plan, output: Path, progress: Progress, say: Say) -> dict[str, Any]:
    with staging(output, staging_key(planned)) as folder:
        what = planned.name, planned.config, planned.target
        made = bundle.write_texts(folder, planned.checkpoint, *what, planned.options.model_config)
        for remark in made.remarks:
            say(remark)
        path, adapters = planned.checkpoint.path, planned.checkpoint.adapters
        decided = planned.config, planned.target, planned.kept, adapters, planned.options.calibrated
        work = Work(path, planned.stamps, folder, *decided)
        done = dict(_run(work, planned.jobs, planned.options.parallel, progress))
        files = {Path(job.file): written for job, written in done.items() if job.kind == "input"}
        inputs = {bundle.input_name(file, path, adapters): written for file, written in files.items()}
        if planned.options.model_config:
            inputs[MODEL_CONFIG] = Written(*_digest(planned.options.model_config))
        if planned.options.calibrated:
            inputs[CALIBRATION] = Written(*_digest(planned.options.calibrated))
        outputs = {job.file: written for job, written in done.items() if job.kind != "input"}
        manifest = bundle.finish(
            folder,
            *what,
            made,
            inputs,
            outputs,
            kept=planned.kept,
            adapters=adapters,
            calibration=planned.calibration,
            pooled=planned.pooled,
        )
        publish(folder, output, replace=planned.options.force)
    return manifest


def _digest(path: Path) -> tuple[str, int]:
    return sha256(path), path.stat().st_size


def staging_key(planned: Plan) -> dict[str, Any]:
    """Everything that files of a killed build depend on: they are reused only if it is equal."""
    return {
        "tools": identity.tools(),
        "name": planned.name,
        "config": as_json(asdict(planned.config)),
        "target": as_json(asdict(planned.target)),
        "inputs": [list(stamp) for stamp in planned.stamps],
        "adapters": [adapter.weight for adapter in planned.checkpoint.adapters],
    }


def _run(work: Work, planned: tuple[Job, ...], parallel: int, progress: Progress) -> Iterator[tuple[Job, Written]]:
    """Runs all jobs, in this process or in `parallel` workers; yields each when it ends."""
    if parallel == 1:
        for job in planned:
            yield job, jobs.run(work, job)
            progress(job)
        return
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)  # no lock: a killed worker could still hold it
    pool = ProcessPoolExecutor(parallel, context, initializer=_start_worker, initargs=(stop,))
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # starting workers must not see Ctrl-C
        try:
            futures: dict[Future[Written], Job] = {pool.submit(_work, work, job): job for job in planned}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                yield futures[future], future.result()
                progress(futures[future])
    except BrokenProcessPool:
        raise KeepStaging(
            BadInput(
                "a worker process was killed, perhaps because memory ran out\n"
                "Finished files are kept: lower --parallel and run the same command again."
            )
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


_stop: Any = None


def _start_worker(stop: Any) -> None:
    """Initialises a worker: it exits with the parent, ignores Ctrl-C, and checks `stop` between blocks."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        threading.Thread(target=lambda: connection.wait([sentinel]) and os._exit(1), daemon=True).start()


def _work(work: Work, job: Job) -> Written:
    return jobs.run(work, job, lambda: bool(_stop.value))
