"""The flags of axrun serve. It imports nothing of the server: every command of axrun reads them."""

from __future__ import annotations

import argparse

from axrun.flags import add_bundle_flags, add_generation_config_flag, add_parse_special_flag, add_speculation_flags


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of `axrun.serve.server.Options`, and the bundles."""
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default 127.0.0.1: this machine only)",
    )
    add("--port", type=int, default=8000, metavar="N", help="port to listen on (default 8000; 0: any free port)")
    add("--slots", type=int, default=4, metavar="N", help="concurrent answers (default 4)")
    what = "memory for keys and values, which all slots share (default: a whole context for each, or what is free)"
    add("--kv-cache-mb", type=int, metavar="MB", help=what)
    add(
        "--max-slowdown",
        type=float,
        default=2.5,
        metavar="X",
        help="while a prompt is read, the next token of other answers may take about X times as long (default 2.5)",
    )
    add("--queue", type=int, default=64, metavar="N", help="requests that may wait for a slot (default 64)")
    add("--timeout", type=float, default=300.0, metavar="S", help="seconds to generate an answer (default 300)")
    add(
        "--read-timeout",
        type=int,
        default=10,
        metavar="S",
        help="seconds to receive a request, and for the client to read a finished answer (default 10)",
    )
    add(
        "--grace",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds to finish running answers on SIGTERM (default 10)",
    )
    add("--max-body", type=int, default=1 << 20, metavar="BYTES", help="largest request body (default 1048576)")
    add(
        "--api-key",
        metavar="KEY",
        help="require this API key; the environment variable AXRUN_API_KEY does the same, and ps does not show it",
    )
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="additional host name to accept, repeatable; * accepts any (default: localhost and IP addresses; "
        "if other machines can connect, also names without public DNS: see docs/serve.md)",
    )
    add(
        "--prompt-cache",
        metavar="DIR",
        help="keep keys and values of prompts in this folder, for the next start too (they reveal the prompts)",
    )
    add("--prompt-cache-mb", type=int, default=1024, metavar="MB", help="largest size of that folder (default 1024)")
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin use the server (CORS), e.g. https://example.org, repeatable; * allows any",
    )
    add("--reasoning-budget", type=int, metavar="N", help="maximum number of tokens of a model's thoughts")
    add(
        "--tool-format",
        metavar="NAME",
        help="how the model writes tool calls: hermes, llama3, mistral, mistral-args, minicpm, gemma or json (default: "
        "as its chat template says)",
    )
    add_parse_special_flag(parser, " (always in the prompt of /v1/completions)")
    add_generation_config_flag(parser)
    add_speculation_flags(parser, "; for one bundle only")
    add("--name", metavar="NAME", help="model name for clients (default: that of the bundle)")
    what = "another name of a bundle, for clients, repeatable; of several bundles, the main name is the folder's"
    add("--alias", action="append", default=[], metavar="NAME=DIR", help=what)
    add(
        "--json",
        action="store_true",
        help="print events on stdout, one JSON object per line: listening (host, port), ready",
    )
    add_bundle_flags(parser, several=True)
