"""The command line of axrun: commands with their flags and output. What they do is in functions of other modules."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from axrun import VERSION, progress
from axrun.command import Verb, dispatch
from axrun.errors import BadInput, CheckFailed
from axrun.flags import (
    JSON_HELP,
    add_bundle_flags,
    add_sampling_flags,
    add_speed_flags,
    engine_of,
    loading_of,
    options_of,
)
from axrun.serve.flags import add_serve_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    description = "Runs axmodel bundles on Axera boards and on any CPU."
    epilog = "start with:\n  axrun run out/tiny-qwen2 --prompt '1+1='"
    return dispatch(argv, "axrun", lambda: VERSION, description, epilog, VERBS)


def _engine_flags(parser: argparse.ArgumentParser) -> None:
    add_speed_flags(parser)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def _run_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="the prompt; - reads it from stdin")
    add("--raw", action="store_true", help="pass the prompt to the model unchanged, without the chat template")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="answer with JSON that is valid under a schema")
    form.add_argument(
        "--grammar", type=Path, metavar="FILE", help="answer with text of a Lark grammar, as in llguidance"
    )
    add("--json", action="store_true", help=JSON_HELP)
    add_bundle_flags(parser)
    add_sampling_flags(parser, " (always with --raw)")


def _run(arguments: argparse.Namespace) -> None:
    from axrun.load import silent
    from axrun.run import Question, run

    prompt = _stdin() if arguments.prompt == "-" else arguments.prompt
    question = Question(prompt, arguments.raw, options_of(arguments))
    answer = run(arguments.bundle, question, loading_of(arguments), silent if arguments.json else _write)
    if arguments.json:
        print(json.dumps(answer.json(), ensure_ascii=False))


def _embed_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "a text, repeatable; - reads texts from stdin, one in each line"
    add("--text", action="append", required=True, metavar="TEXT", help=what)
    add("--dimensions", type=int, metavar="N", help="only the first N dimensions (default: all)")
    add("--truncate", action="store_true", help="use the beginning of a text that is too long (default: an error)")
    add("--json", action="store_true", help=JSON_HELP)
    add_bundle_flags(parser)


def _embed(arguments: argparse.Namespace) -> None:
    from axrun.embeddings import embed, numbers

    texts = [text for given in arguments.text for text in (_stdin().split("\n") if given == "-" else [given])]
    made = embed(arguments.bundle, texts, arguments.dimensions, arguments.truncate, loading_of(arguments))
    vectors = [numbers(vector) for vector in made.vectors]
    if arguments.json:
        print(json.dumps({"embeddings": vectors, "prompt_tokens": made.tokens}))
    else:
        print("\n".join(map(json.dumps, vectors)))


def _chat_flags(parser: argparse.ArgumentParser) -> None:
    add_bundle_flags(parser)
    add_sampling_flags(parser)


def _chat(arguments: argparse.Namespace) -> None:
    from axrun.chat.repl import chat
    from axrun.chat.terminal import Terminal

    chat(arguments.bundle, options_of(arguments), Terminal(), loading_of(arguments))


def _eval_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--reference", type=Path, metavar="FILE", help="output of `axc reference` (default: the one in the bundle)")
    add("--max-kld", type=float, metavar="X", help="exit with 1 if the mean KL divergence is above X")
    add("--min-top1", type=float, metavar="X", help="exit with 1 if the top-1 agreement (0 to 1) is below X")
    add("--json", action="store_true", help=JSON_HELP)
    add_bundle_flags(parser)


def _eval(arguments: argparse.Namespace) -> None:
    from axrun.measure.evaluate import evaluate

    evaluation = evaluate(arguments.bundle, arguments.reference, loading_of(arguments))
    print(json.dumps(evaluation.json()) if arguments.json else "\n".join(evaluation.table()), flush=True)
    evaluation.require(arguments.max_kld, arguments.min_top1)


def _trace_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rows", metavar="PART", default="", help="add a digest for each token, of one part: 'layer 3' or post")
    add("--tokens", type=int, metavar="N", help="number of tokens (default: the whole context)")
    add("--json", action="store_true", help=JSON_HELP)
    add_bundle_flags(parser)


def _trace(arguments: argparse.Namespace) -> None:
    from axrun.measure.trace import trace

    found = trace(arguments.bundle, arguments.rows, arguments.tokens, loading_of(arguments))
    print(json.dumps(found.json()) if arguments.json else "\n".join(found.table()), flush=True)


def _bench_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--prompt-lengths",
        type=_numbers,
        metavar="N,N",
        help="prompt lengths in tokens (default 16,128,512, if they fit)",
    )
    add("--depths", type=_numbers, metavar="N,N", help="tokens in the KV cache before decoding (default: the same)")
    add("--tokens", type=int, default=32, metavar="N", help="tokens to decode per run (default 32)")
    add("--warmup", type=int, default=1, metavar="N", help="untimed runs first (default 1)")
    add("--repeat", type=int, default=5, metavar="N", help="timed runs (default 5)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help=JSON_HELP)
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    add_bundle_flags(parser)


def _bench(arguments: argparse.Namespace) -> None:
    from axrun.measure.bench import Options, bench

    lengths = arguments.prompt_lengths, arguments.depths
    options = Options(*lengths, arguments.tokens, arguments.warmup, arguments.repeat)
    report = bench(arguments.bundle, options, loading_of(arguments))
    if arguments.json:
        print(json.dumps(report.json()))
    else:
        print("\n".join(report.markdown() if arguments.markdown else report.lines()))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _serve(arguments: argparse.Namespace) -> None:
    from axrun.memory import refuse
    from axrun.serve.server import Options, serve

    options = Options(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Options)})
    announce = _announce if arguments.json else lambda event: None
    loading = loading_of(arguments)
    if len(arguments.bundles) > 1 and not arguments.force:
        loading = dataclasses.replace(loading, allow=refuse)  # models are loaded while nobody looks
    serve(arguments.bundles, options, loading, announce)


def _announce(event: Mapping[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="an .axmodel file")
    add("--group", type=int, metavar="G", help="shape group to time (default: all)")
    add("--warmup", type=int, default=3, metavar="N", help="untimed runs first (default 3)")
    add("--repeat", type=int, default=20, metavar="N", help="timed runs (default 20)")
    _engine_flags(parser)


def _model(arguments: argparse.Namespace) -> None:
    from axrun.measure.latency import measure

    latencies = measure(
        arguments.file, arguments.group, arguments.warmup, arguments.repeat, engine_of(arguments), arguments.threads
    )
    if arguments.json:
        print(json.dumps({"file": str(arguments.file), "groups": [latency._asdict() for latency in latencies]}))
        return
    print(f"{arguments.file}: {arguments.repeat} runs of each group, milliseconds")
    print("group  tokens  history       min       max       avg    median")
    for entry in latencies:
        figures = "".join(f"{ms:10.3f}" for ms in (entry.min_ms, entry.max_ms, entry.avg_ms, entry.median_ms))
        print(f"{entry.group:5}{entry.tokens:8}{entry.history:9}{figures}")


def _doctor_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="bundle folder")
    _engine_flags(parser)


def _doctor(arguments: argparse.Namespace) -> None:
    from axrun.doctor.examine import examine

    report = examine(arguments.bundle, engine_of(arguments), arguments.threads, progress.show, progress.mention)
    print(json.dumps(report.json()) if arguments.json else "\n".join(report.lines()), flush=True)
    if report.finding:
        raise CheckFailed(f"{report.bundle} is {report.verdict}: {report.finding.stage}: {report.finding.part}")


def _stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"stdin is not UTF-8 at byte {error.start}") from None
    return text[:-1] if text.endswith("\n") else text


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


VERBS = {
    "run": Verb(
        _run_flags,
        _run,
        "Ask a bundle one question. The answer goes to stdout, everything else to stderr.",
        "examples:\n"
        "  axrun run out/tiny-qwen2 --prompt '1+1='\n"
        "  axrun run out/qwen2-0.5b --prompt 'Why is the sky blue?' --temperature 0.7 --top-p 0.8 --seed 1\n"
        "  echo 'Once upon a time' | axrun run out/qwen2-0.5b --prompt - --raw --max-tokens 50 > story.txt",
    ),
    "chat": Verb(
        _chat_flags,
        _chat,
        "Chat with a bundle, in a terminal or through a pipe. The conversation stays in the KV cache.",
        "examples:\n"
        "  axrun chat out/tiny-qwen2\n"
        "  axrun chat out/qwen2-0.5b --system 'You answer in one sentence.' --temperature 0.7 --top-p 0.8\n"
        "  printf '1+1=\\n2+2=\\n' | axrun chat out/tiny-qwen2 2> log.txt",
    ),
    "serve": Verb(
        add_serve_flags,
        _serve,
        "Serve OpenAI's and Ollama's HTTP APIs, and a chat page at /. Ctrl-C and SIGTERM stop it.",
        "examples:\n"
        "  axrun serve out/tiny-qwen2\n"
        "  AXRUN_API_KEY=secret axrun serve out/qwen2-0.5b --host 0.0.0.0 --slots 2\n"
        "  axrun serve out/qwen2-0.5b out/qwen3-embedding-0.6b --alias embeddings=out/qwen3-embedding-0.6b\n"
        "  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        '      -d \'{"prompt": "Once upon a time", "max_tokens": 20}\'',
    ),
    "embed": Verb(
        _embed_flags,
        _embed,
        "Make embeddings of texts, with a bundle of an embedding model, or one built with --ret_postnorm. "
        "One list of numbers in each line.",
        "examples:\n"
        "  axrun embed out/qwen3-embedding-0.6b --text 'Why is the sky blue?'\n"
        "  axrun embed out/qwen3-embedding-0.6b --text - --dimensions 256 --json < texts.txt > vectors.json",
    ),
    "eval": Verb(
        _eval_flags,
        _eval,
        "Measure quality against the checkpoint: perplexity, KL divergence, token agreement.",
        "examples:\n"
        "  axc reference --input_path models/tiny-qwen2 --text models/tiny-qwen2/heldout.txt --bundle out/tiny-qwen2\n"
        "  axrun eval out/tiny-qwen2\n"
        "  axrun eval out/qwen2-0.5b --reference qwen2.npz --json --max-kld 0.01 --min-top1 0.95",
    ),
    "trace": Verb(
        _trace_flags,
        _trace,
        "Print digests of what every layer computes, to find where two machines differ.",
        "With the engine ax and integer weights, every machine prints the same. The first line that differs is the\n"
        "layer where one of them goes wrong. Compare bundles with the same manifest: a reference in the bundle gives\n"
        "other tokens, and all digests differ.\n"
        "examples:\n"
        "  axrun trace out/tiny-qwen2 > here.txt\n"
        "  ssh root@board sh axc/current/axrun trace axc/current/model | diff here.txt -\n"
        "  axrun trace out/tiny-qwen2 --rows 'layer 3'",
    ),
    "bench": Verb(
        _bench_flags,
        _bench,
        "Measure speed: load time, time to first token, prefill and decode, at several context depths.",
        "examples:\n"
        "  axrun bench out/tiny-qwen2\n"
        "  axrun bench out/qwen2-0.5b --prompt-lengths 23,128 --depths 128,512 --threads 2 --json",
    ),
    "doctor": Verb(
        _doctor_flags,
        _doctor,
        "Check a bundle stage by stage, and report the first one that disagrees with the checkpoint.",
        "Layers, cache and answers are compared with the figures that `axc reference --bundle` stores in the bundle.\n"
        "Exits with 1 if a stage disagrees, else with 0; stages that cannot be examined are listed.\n"
        "examples:\n"
        "  axrun doctor out/tiny-qwen2\n"
        "  axrun doctor out/qwen2-0.5b --engine ax --json",
    ),
    "model": Verb(
        _model_flags,
        _model,
        "Time one axmodel, per shape group.",
        "examples:\n"
        "  axrun model out/tiny-qwen2/qwen2_post.axmodel\n"
        "  axrun model out/qwen2-0.5b/qwen2_p128_l0_together.axmodel --group 0 --repeat 100 --threads 1 --json",
    ),
}
