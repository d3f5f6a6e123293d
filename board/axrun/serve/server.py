"""The process of axrun serve: load, listen, shut down on a signal."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from axrun.errors import BadInput
from axrun.load import DEFAULTS, Loading
from axrun.serve.app import ASSETS, LIBRARIES, App, Limits
from axrun.serve.connection import Protocol
from axrun.serve.hosts import ANY, NAME, Hosts
from axrun.serve.metrics import Metrics, ServerMetrics
from axrun.serve.models import Models
from axrun.serve.names import aliases_of, names_of
from axrun.serve.origins import ANY as ANY_ORIGIN
from axrun.serve.origins import ORIGIN, Origins
from axrun.serve.served import Served
from axrun.text.tool_formats import FORMATS

KEY_VARIABLE = "AXRUN_API_KEY"
LAST_RUN = 10  # seconds after the grace for the engine's last run and the last responses
MEGABYTES = "1 to 1048576"

Announce = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Options:
    """Options of the server. `name` None: that of the bundle. `api_key` None: $AXRUN_API_KEY, if set.

    `kv_cache_mb`: memory for the keys and values of all slots; None: as much as they can use, if that is free.
    `max_slowdown`: of the next tokens of answers, while prompts of others are read; see `axrun.serve.pace.Pace`.
    `prompt_cache`: folder for keys and values of prompts, of up to `prompt_cache_mb`. `allowed_host`: further host
    names to accept, besides those of `axrun.serve.hosts`; "*" accepts any. `parse_special`: special tokens spelled in a
    chat message are control tokens, not text. `generation_config`: take the sampling defaults from the checkpoint's
    generation_config.json, not from post_config.json. `speculation`: guess tokens by prompt lookup, and with the draft
    model in the bundle `draft`. `tool_format`: how the model writes tool calls, a key of
    `axrun.text.tool_formats.FORMATS`; None: chosen from the chat template.
    `reasoning_budget`: maximum number of tokens of a model's thoughts. `allow_origin`: origins whose pages may use the
    server. `alias`: further names of bundles, as NAME=DIR.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 4
    kv_cache_mb: int | None = None
    max_slowdown: float = 2.5
    queue: int = 64
    timeout: float = 300.0
    read_timeout: int = 10
    grace: float = 10.0
    max_body: int = 1 << 20
    api_key: str | None = None
    name: str | None = None
    prompt_cache: str | None = None
    prompt_cache_mb: int = 1024
    allowed_host: Sequence[str] = ()
    parse_special: bool = False
    generation_config: bool = False
    speculation: bool = True
    draft: Path | None = None
    tool_format: str | None = None
    reasoning_budget: int | None = None
    allow_origin: Sequence[str] = ()
    alias: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises BadInput for a value out of range."""
        for flag, value, holds, expected in (
            ("--port", self.port, 0 <= self.port <= 65535, "0 (any that is free) to 65535"),
            ("--slots", self.slots, 1 <= self.slots <= 256, "1 to 256"),
            (
                "--kv-cache-mb",
                self.kv_cache_mb,
                self.kv_cache_mb is None or 1 <= self.kv_cache_mb <= 1 << 20,
                MEGABYTES,
            ),
            ("--max-slowdown", self.max_slowdown, 1.1 <= self.max_slowdown <= 1000, "1.1 to 1000"),
            ("--queue", self.queue, 1 <= self.queue <= 10_000, "1 to 10000 requests"),
            ("--timeout", self.timeout, 0 < self.timeout <= 86_400, "above 0, up to 86400 seconds"),
            ("--read-timeout", self.read_timeout, 1 <= self.read_timeout <= 3600, "1 to 3600 seconds"),
            ("--grace", self.grace, 0 <= self.grace <= 3600, "0 to 3600 seconds"),
            ("--reasoning-budget", self.reasoning_budget or 0, (self.reasoning_budget or 0) >= 0, "at least 0 tokens"),
            ("--max-body", self.max_body, 1 <= self.max_body <= 1 << 30, "1 to 1073741824 bytes"),
            ("--prompt-cache-mb", self.prompt_cache_mb, 1 <= self.prompt_cache_mb <= 1 << 20, MEGABYTES),
        ):
            if not holds:
                raise BadInput(f"{flag} is {value}, expected {expected}")
        if self.draft is not None and not self.speculation:
            raise BadInput("--draft and --no-speculation contradict each other: give one of them")
        for name in self.allowed_host:
            if name != ANY and not NAME.fullmatch(name):
                raise BadInput(f"--allowed-host is {name!r}, expected a name without scheme and port, or {ANY}")
        for origin in self.allow_origin:
            if origin != ANY_ORIGIN and not ORIGIN.fullmatch(origin):
                raise BadInput(f"--allow-origin is {origin!r}, expected e.g. https://example.org, or {ANY_ORIGIN}")
        if self.tool_format is not None and self.tool_format not in FORMATS:
            raise BadInput(f"--tool-format is {self.tool_format!r}, expected one of {', '.join(FORMATS)}")
        key = self.key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
            raise BadInput(
                "the API key is empty or has characters that are not allowed in a header; use letters and digits"
            )

    @property
    def key(self) -> str | None:
        return os.environ.get(KEY_VARIABLE) if self.api_key is None else self.api_key


def serve(
    paths: Sequence[Path], options: Options, loading: Loading = DEFAULTS, announce: Announce = lambda event: None
) -> None:
    """Serves bundles until SIGTERM or SIGINT.

    `announce` receives the events `listening`, with host and port, and `ready`, for each model that was loaded.
    Raises BadInput for a bundle or an address that cannot be used, CheckFailed if a bundle fails verification.
    """
    say, alone = loading.say, len(paths) == 1
    aliases = aliases_of(paths, options.alias)
    bundles = [loading.open(path) for path in paths]
    if alone:
        named = [(options.name or bundles[0].name, *aliases[0])]
    elif options.draft is not None:
        raise BadInput("--draft is for one bundle: a draft model needs the tokenizer of the model it guesses for")
    elif options.name:
        raise BadInput("--name is for one bundle; name several with --alias NAME=DIR")
    else:
        named = names_of(paths, aliases)
    metrics = ServerMetrics([name for name, *_ in named])
    listed = [
        Served(bundle, given, options, loading, Metrics(metrics, given[0]), alone)
        for bundle, given in zip(bundles, named)
    ]
    name = listed[0].name
    _ = listed[0].reader  # refuses a damaged tokenizer before anything is loaded
    with _listen(options.host, options.port) as listener:
        models = Models(
            listed,
            options.queue,
            loading.allow,
            say,
            ready=lambda loaded: announce({"event": "ready", "model": loaded}),
            ended=lambda: server.leave(),
        )
        limits = Limits(options.timeout, options.read_timeout, options.max_body)
        host, port = listener.getsockname()[:2]
        loopback = ipaddress.ip_address(host).is_loopback
        own = [options.host] if loopback else [options.host, socket.gethostname()]
        hosts = Hosts(loopback, options.key is not None, own, options.allowed_host)
        app = App(models, metrics, limits, hosts, options.key, say, Origins(options.allow_origin))
        server = Server(app, models, options.grace, options.read_timeout)
        say(f"Starting server on port {port} with model '{name}'...")
        if not alone:
            say(_listing(listed))
        if options.key is None and not loopback:
            say(f"warning: anyone who can reach {host} can use this model; set {KEY_VARIABLE} to require a key")
        address = f"[{host}]" if ":" in host else host
        if not LIBRARIES.keys() <= ASSETS.keys():
            say("the page shows answers as plain text; run `make page` to install its Markdown libraries")
        say(f"OpenAI API Server starting on http://{address}:{port}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)  # uvicorn restores it at the end; a signal is no failure
        announce({"event": "listening", "host": host, "port": port})
        server.run([listener])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a signal during exit would change the exit code
    models.join(1.0)


class Server(uvicorn.Server):
    """A uvicorn server that stops together with the models."""

    def __init__(self, app: Any, models: Models, grace: float, read_timeout: int) -> None:
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=read_timeout,
            timeout_graceful_shutdown=int(grace) + LAST_RUN,
        )
        super().__init__(config)
        self._models, self._grace = models, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts a graceful shutdown; the second one forces it."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    def leave(self) -> None:
        """Stops the server after a model has failed."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._models.begin()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._models.stop(0.0 if self.force_exit else self._grace)
        await super().shutdown(sockets)


def _listing(listed: Sequence[Served]) -> str:
    """The line that names the models."""
    first, *others = (served.name for served in listed)
    aliases = [f"{alias} = {served.name}" for served in listed for alias in served.names[1:]]
    line = f"models: {first} (loaded now); at their first use: {', '.join(others)}"
    return f"{line}; aliases: {', '.join(aliases)}" if aliases else line


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises BadInput if the address is not available."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise BadInput(
            f"cannot listen on {host} port {port}: {error.strerror or error}\nChoose another with --host or --port."
        ) from None
    return listener
