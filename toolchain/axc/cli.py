"""axc: the compiler's commands. Each verb calls a function of another module; this one defines the flags."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from axc import VERSION, identity, vendor_flags
from axrun.command import Verb, dispatch
from axrun.errors import BadInput

if TYPE_CHECKING:
    from axc.calibration.options import Options as Calibration

WEIGHTS = ("fp32", "fp16", "bf16", "s8", "s4", "fp8_e4m3", "fp8_e5m2")

CHIP_NAMES = {"AX630C": "AX620E"}  # a chip, and the vendor's name of its family


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    description = "Compiles Hugging Face LLM checkpoints to axmodel bundles for AX650 and AX630C boards."
    # torch reads this at import. Spinning while waiting makes a calibration 25 times slower on busy CPUs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    epilog = "start with:\n  axc llm_build --input_path models/tiny-qwen2 --output_path out/tiny-qwen2 -c 2"
    return dispatch(argv, "axc", _version, description, epilog, VERBS)


def _version() -> str:
    return f"{VERSION} (digest {identity.digest()})"


def _lora(arguments: argparse.Namespace) -> Any:
    from axc.checkpoints import Lora

    return tuple(Lora.parse(text) for text in arguments.lora)


def _llm_build_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input_path", type=Path, required=True, help="folder of the checkpoint, quantised or not, or a GGUF file")
    add("--output_path", type=Path, required=True, help="folder of the bundle; it must not hold another one")
    add("--prefill_len", type=int, help="tokens of a prefill chunk; 0: no prefill groups (default 0)")
    add("--parallel", type=int, default=1, help="number of processes; does not change the result (default 1)")
    add("--model_config", type=Path, help="a config.json to use in place of the checkpoint's")
    add("--model_type", help="build as this architecture, whatever config.json says")
    add("--kv_cache_len", type=int, help="rows of K/V cache: the longest context (default 127)")
    add(
        "--post_topk", type=int, default=0, help="the post model also returns the k most likely tokens (default 0: off)"
    )
    add(
        "--post_weight_type",
        choices=WEIGHTS,
        help="type of the lm_head's weights (default: its stored quantisation, else s8)",
    )
    add(
        "-t",
        "--hidden_state_type",
        choices=("fp32", "fp16", "bf16"),
        default="bf16",
        help="of hidden states and K/V (default bf16)",
    )
    add(
        "-w",
        "--weight_type",
        choices=WEIGHTS,
        help="of the layers' matrices (default: their stored quantisation, else s8)",
    )
    add(
        "-c",
        "--check_level",
        type=int,
        choices=(-1, 0, 1, 2),
        default=0,
        help="-1 none; 0 load and run every axmodel; 1 also compare every layer with the float32 reference; "
        "2 also compare the tokens generated from --prompt (default 0)",
    )
    add("--chip", choices=("AX650", "AX620E", "AX630C"), default="AX650", help="AX630C means AX620E (default AX650)")
    add("--prompt", default="1+1=", help="prompt of check level 2 (default 1+1=)")
    add(
        "--last_kv_cache_len",
        type=int,
        action="append",
        default=[],
        help="add a group that prefills after this many rows of history; may be repeated",
    )
    add("--ret_postnorm", action="store_true", help="the post model also returns the normalised hidden state")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="DIR[:WEIGHT]",
        help="merge this peft adapter first, its change times WEIGHT (default 1); may be repeated",
    )
    add(
        "--quantizer",
        choices=("rtn", "gptq"),
        help="rtn: round to nearest; gptq: calibrate s4 or s8 on a text, which takes minutes "
        "(default gptq for s4, unless the checkpoint has levels that s4 keeps, else rtn)",
    )
    add("--calibrated", type=Path, metavar="FILE", help="calibration file written by axc calibrate")
    add("--calibrated_sha256", metavar="HEX", help="expected SHA-256 of that file")
    _calibration_flags(parser)
    add("--model_name", help="name in the manifest (default: the model type)")
    add("--force", action="store_true", help="replace an existing bundle at --output_path")
    add("--check_report", type=Path, help="write the check's figures to this JSON file")
    vendor_flags.refuse(parser)


def _calibration_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--bits",
        type=float,
        help="gptq: most bits per weight on average, 4.5 to 8.5; s8 for the most sensitive matrices, s4 for the rest",
    )
    add(
        "--calibration",
        type=Path,
        action="append",
        default=[],
        metavar="TEXT",
        help="gptq: UTF-8 text to calibrate on, may be repeated (default: the text shipped with axc)",
    )
    add(
        "--calibration_tokens",
        type=int,
        help="gptq: maximum number of tokens of that text, at least 512 (default 32768)",
    )


def _llm_build(arguments: argparse.Namespace) -> None:
    from axc import console
    from axc.build import Options
    from axc.calibration import options as calibrations

    if arguments.calibrated_sha256 and not arguments.calibrated:
        raise BadInput("--calibrated_sha256 is the digest of a calibration file: give the file with --calibrated")
    options = Options(
        input_path=arguments.input_path,
        output_path=arguments.output_path,
        prefill_len=Options.prefill_len if arguments.prefill_len is None else arguments.prefill_len,
        parallel=arguments.parallel,
        model_config=arguments.model_config,
        model_type=arguments.model_type,
        kv_cache_len=Options.kv_cache_len if arguments.kv_cache_len is None else arguments.kv_cache_len,
        post_topk=arguments.post_topk,
        post_weight_type=arguments.post_weight_type,
        hidden_state_type=arguments.hidden_state_type,
        weight_type=arguments.weight_type,
        chip=CHIP_NAMES.get(arguments.chip, arguments.chip),
        last_kv_cache_len=tuple(arguments.last_kv_cache_len),
        ret_postnorm=arguments.ret_postnorm,
        model_name=arguments.model_name,
        calibrated=arguments.calibrated,
        calibrated_sha256=arguments.calibrated_sha256,
        force=arguments.force,
        lora=_lora(arguments),
    )
    calibration = None
    asked = arguments.quantizer, arguments.calibrated, arguments.bits, arguments.calibration
    if calibrations.wanted(arguments.input_path, arguments.weight_type, *asked, arguments.calibration_tokens):
        calibration = _calibration(arguments)
    notes = _default_notes(arguments)
    console.llm_build(options, arguments.check_level, arguments.prompt, arguments.check_report, calibration, notes)


def _default_notes(arguments: argparse.Namespace) -> list[str]:
    """Notes on the vendor's defaults, which make a small and slow bundle."""
    from axc.build import Options

    notes = []
    if arguments.kv_cache_len is None:
        context = f"the context, prompt and answer, is {Options.kv_cache_len} tokens"
        notes.append(f"{context}: for more, set --kv_cache_len, e.g. 1023")
    if arguments.prefill_len is None:
        notes.append("the prompt is processed token by token: to process it in chunks, set --prefill_len, e.g. 64")
    return notes


def _calibration(arguments: argparse.Namespace) -> Calibration:
    from axc.calibration.options import TOKENS, Options

    return Options(
        input_path=arguments.input_path,
        weight_type=arguments.weight_type or "s4",
        bits=arguments.bits,
        calibration=tuple(arguments.calibration),
        tokens=TOKENS if arguments.calibration_tokens is None else arguments.calibration_tokens,
        model_config=arguments.model_config,
        model_type=arguments.model_type,
        lora=_lora(arguments),
    )


def _calibrate_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input_path", type=Path, required=True, help="checkpoint folder or GGUF file")
    add("--output_path", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    add("-w", "--weight_type", choices=("s4", "s8"), help="of the layers' matrices (default s4)")
    _calibration_flags(parser)
    add("--model_config", type=Path, help="a config.json to use in place of the checkpoint's")
    add("--model_type", help="calibrate as this architecture, whatever config.json says")
    add("--lora", action="append", default=[], metavar="DIR[:WEIGHT]", help="merge this peft adapter first")


def _calibrate(arguments: argparse.Namespace) -> None:
    from axc import console

    console.calibrate(_calibration(arguments), arguments.output_path)


def _embed_flags(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True, title="steps")
    for name, source, target, summary in (
        ("extract", "checkpoint folder", "folder", "a checkpoint's table as float32 model.embed_tokens.weight.npy"),
        ("float32", ".npy file", "file", "that .npy as raw little-endian float32"),
        ("bfloat16", "raw float32 file", "file", "that raw float32 as raw bfloat16, rounded to nearest even"),
    ):
        step = steps.add_parser(name, help=summary, description=summary)
        step.add_argument("--input_path", type=Path, required=True, help=source)
        step.add_argument("--output_path", type=Path, required=True, help=target)


def _embed(arguments: argparse.Namespace) -> None:
    from axc import embed

    written = getattr(embed, arguments.step)(arguments.input_path, arguments.output_path)
    print(f"{written}: {written.stat().st_size:,} bytes")


def _inspect_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="an .axmodel file, ours or the vendor's, or a bundle folder")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _inspect(arguments: argparse.Namespace) -> None:
    from axc import inspect

    print(inspect.as_json(arguments.path) if arguments.json else inspect.as_text(arguments.path))


def _verify_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="bundle folder")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _verify(arguments: argparse.Namespace) -> None:
    from axc import console

    console.verify(arguments.path, as_json=arguments.json)


def _doctor_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    add("--checkpoint", type=Path, required=True, metavar="PATH", help="the checkpoint it was built from")
    add("--model_config", type=Path, metavar="FILE", help="the --model_config of the build, if any")
    add("--model_type", help="the --model_type of the build, if any")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="DIR[:WEIGHT]",
        help="a --lora of the build; may be repeated",
    )
    add(
        "--engine",
        choices=("auto", "ax", "ort"),
        default="auto",
        help="what runs axmodels (default auto: as axrun does)",
    )
    add("--board", metavar="B", help="also examine the deployed bundle on this board of the checkout")
    add("--model", metavar="NAME", help="name under which it is deployed there (default: the bundle folder's)")
    add("--json", action="store_true", help="machine-readable")


def _doctor(arguments: argparse.Namespace) -> None:
    from axc.doctor import console
    from axc.doctor.case import Options

    options = Options(
        bundle=arguments.bundle,
        checkpoint=arguments.checkpoint,
        model_config=arguments.model_config,
        model_type=arguments.model_type,
        engine=arguments.engine,
        lora=_lora(arguments),
    )
    console.doctor(options, as_json=arguments.json, board=arguments.board, model=arguments.model)


def _reference_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input_path", type=Path, required=True, help="folder of the checkpoint, quantised or not, or a GGUF file")
    add("--text", type=Path, required=True, help="UTF-8 file to measure over")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--output_path", type=Path, metavar="FILE", help="file to write")
    place.add_argument("--bundle", type=Path, metavar="DIR", help="add it to this bundle of the checkpoint")
    add("--window", type=int, help="tokens per window (default 512; with --bundle, enough to use all groups)")
    add("--tokens", type=int, default=16384, help="maximum number of tokens of the text (default 16384)")
    add("--top_k", type=int, default=256, help="most likely tokens to store per position (default 256)")
    add("--greedy_tokens", type=int, default=32, help="length of the greedy answers; 0: none (default 32)")
    add("--model_config", type=Path, help="a config.json to use in place of the checkpoint's")
    add("--model_type", help="architecture of a checkpoint whose own model_type transformers does not know")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="DIR[:WEIGHT]",
        help="merge this peft adapter first; may be repeated",
    )


def _reference(arguments: argparse.Namespace) -> None:
    from axc import console
    from axc.logits import Options

    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)}
    console.reference(Options(**{**given, "lora": _lora(arguments)}))


def _synth_flags(parser: argparse.ArgumentParser) -> None:
    from axc.shapes import SHAPES

    parser.add_argument("--model", required=True, choices=sorted(SHAPES), help="model whose shapes are used")
    parser.add_argument("--output_path", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument("--tokenizer_path", type=Path, help="folder of tokenizer files to copy in")


def _synth(arguments: argparse.Namespace) -> None:
    from axc import console

    console.synth(arguments.model, arguments.output_path, arguments.seed, arguments.tokenizer_path)


VERBS = {
    "llm_build": Verb(
        _llm_build_flags,
        _llm_build,
        "Compile a checkpoint to a bundle.",
        "example:\n  axc llm_build --input_path Qwen2-0.5B-Instruct --output_path out/qwen2-0.5b --prefill_len 128 \\\n"
        "      --kv_cache_len 1023 --hidden_state_type bf16 -w s8 --chip AX650 --parallel 2 --check_level 1",
    ),
    "calibrate": Verb(
        _calibrate_flags,
        _calibrate,
        "Quantise the layers of a checkpoint by calibration on a text; writes a file for llm_build --calibrated.",
        "example:\n  axc calibrate --input_path Qwen2-0.5B-Instruct --output_path qwen2-0.5b.safetensors -w s4\n"
        "  axc llm_build --input_path Qwen2-0.5B-Instruct --output_path out/qwen2-0.5b "
        "--calibrated qwen2-0.5b.safetensors",
    ),
    "embed": Verb(
        _embed_flags,
        _embed,
        "The embedding table in three steps: extract, float32, bfloat16.",
        "example:\n  axc embed extract --input_path Qwen2-0.5B-Instruct --output_path work",
    ),
    "inspect": Verb(
        _inspect_flags,
        _inspect,
        "Show the content of an axmodel or a bundle.",
        "example:\n  axc inspect out/tiny-qwen2/qwen2_post.axmodel --json",
    ),
    "verify": Verb(
        _verify_flags,
        _verify,
        "Verify every file of a bundle against its manifest.",
        "example:\n  axc verify out/tiny-qwen2",
    ),
    "doctor": Verb(
        _doctor_flags,
        _doctor,
        "Find the first stage at which a bundle disagrees with its checkpoint, and why. Exit code 1 if there is one.",
        "examples:\n"
        "  axc doctor out/tiny-qwen2 --checkpoint models/tiny-qwen2\n"
        "  axc doctor out/qwen2-0.5b --checkpoint Qwen2-0.5B-Instruct --json",
    ),
    "reference": Verb(
        _reference_flags,
        _reference,
        "Write the float32 checkpoint's logits over a text, which `axrun eval` measures a bundle against.",
        "examples:\n"
        "  axc reference --input_path models/tiny-qwen2 --text models/tiny-qwen2/heldout.txt --bundle out/tiny-qwen2\n"
        "  axc reference --input_path Qwen2-0.5B-Instruct --text wiki.txt --output_path qwen2.npz --window 512",
    ),
    "synth": Verb(
        _synth_flags,
        _synth,
        "Write a seeded random checkpoint with a named model's real shapes, for benchmarks.",
        "example:\n  axc synth --model qwen2-0.5b --output_path work/qwen2-0.5b",
    ),
}


if __name__ == "__main__":
    sys.exit(main())
