"""The process of axrun serve: load, listen, shut down on a signal."""

from __future__ import annotations

import hashlib
import ipaddress
import json
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
from axrun.format.bundle import Bundle
from axrun.load import DEFAULTS, Loading, describe
from axrun.prompt_cache import PromptCache
from axrun.sampling.checkpoint import sampling_of
from axrun.sampling.grammar import Compiler
from axrun.serve.app import ASSETS, LIBRARIES, App, Limits
from axrun.serve.connection import Protocol
from axrun.serve.hosts import ANY, NAME, Hosts
from axrun.serve.metrics import Metrics
from axrun.serve.order import Reader
from axrun.serve.origins import ANY as ANY_ORIGIN
from axrun.serve.origins import ORIGIN, Origins
from axrun.serve.scheduler import Scheduler, Write
from axrun.serve.slots import Slot, allocate
from axrun.serve.tools import Toolbox
from axrun.serve.writer import Writer
from axrun.session import engine_version
from axrun.text.template import ChatTemplate
from axrun.text.tokenizer import Tokenizer
from axrun.text.tool_formats import FORMATS

KEY_VARIABLE = "AXRUN_API_KEY"

Announce = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Options:
    """Options of the server. `name` None: that of the bundle. `api_key` None: $AXRUN_API_KEY, if set.

    `max_slowdown`: of the next tokens of answers, while prompts of others are read; see `axrun.serve.pace.Pace`.
    `prompt_cache`: folder for keys and values of prompts, of up to `prompt_cache_mb`. `allowed_host`: further host
    names to accept, besides those of `axrun.serve.hosts`; "*" accepts any. `parse_special`: special tokens spelled in a
    chat message are control tokens, not text. `generation_config`: take the sampling defaults from the checkpoint's
    generation_config.json, not from post_config.json. `speculation`: guess tokens by prompt lookup. `tool_format`: how
    the model writes tool calls, a key of `axrun.text.tool_formats.FORMATS`; None: chosen from the chat template.
    `reasoning_budget`: maximum number of tokens of a model's thoughts. `allow_origin`: origins whose pages may use the
    server.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    slots: int = 4
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
    tool_format: str | None = None
    reasoning_budget: int | None = None
    allow_origin: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises BadInput for a value out of range."""
        for flag, value, holds, expected in (
            ("--port", self.port, 0 <= self.port <= 65535, "0 (any that is free) to 65535"),
            ("--slots", self.slots, 1 <= self.slots <= 256, "1 to 256"),
            ("--max-slowdown", self.max_slowdown, 1.1 <= self.max_slowdown <= 1000, "1.1 to 1000"),
            ("--queue", self.queue, 1 <= self.queue <= 10_000, "1 to 10000 requests"),
            ("--timeout", self.timeout, 0 < self.timeout <= 86_400, "above 0, up to 86400 seconds"),
            ("--read-timeout", self.read_timeout, 1 <= self.read_timeout <= 3600, "1 to 3600 seconds"),
            ("--grace", self.grace, 0 <= self.grace <= 3600, "0 to 3600 seconds"),
            ("--reasoning-budget", self.reasoning_budget or 0, (self.reasoning_budget or 0) >= 0, "at least 0 tokens"),
            ("--max-body", self.max_body, 1 <= self.max_body <= 1 << 30, "1 to 1073741824 bytes"),
            ("--prompt-cache-mb", self.prompt_cache_mb, 1 <= self.prompt_cache_mb <= 1 << 20, "1 to 1048576"),
        ):
            if not holds:
                raise BadInput(f"{flag} is {value}, expected {expected}")
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


def serve(path: Path, options: Options, loading: Loading = DEFAULTS, announce: Announce = lambda event: None) -> None:
    """Serves a bundle until SIGTERM or SIGINT.

    `announce` receives the events `listening`, with host and port, and `ready`.
    Raises BadInput for a bundle or an address that cannot be used, CheckFailed if the bundle fails verification.
    """
    bundle, say = loading.open(path), loading.say
    tokenizer = Tokenizer.open(bundle.hf)
    sampling, remark = sampling_of(bundle, options.generation_config)
    if remark:
        say(f"note: {remark}")
    template = ChatTemplate.find(bundle.hf)
    reader = Reader(
        tokenizer,
        template,
        sampling,
        Compiler(tokenizer, bundle.vocab_size),
        Toolbox(template, tokenizer, options.tool_format),
        bundle,
        options.parse_special,
        options.reasoning_budget,
    )
    prompt_cache = None
    if options.prompt_cache is not None:
        identity = f"{_digest(bundle)} {loading.engine} {engine_version(loading.engine)}"
        prompt_cache = PromptCache(Path(options.prompt_cache), identity, options.prompt_cache_mb << 20, say)
    name = options.name or bundle.name
    metrics = Metrics(name)

    def load_slots() -> tuple[Sequence[Slot], Write]:
        model = loading.load(bundle)
        for line in describe(model, bundle):
            say(line)
        slots = allocate(model, options.slots, loading.allow)
        return slots, Writer(tokenizer, prompt_cache, options.speculation).write

    with _listen(options.host, options.port) as listener:
        scheduler = Scheduler(
            load_slots,
            options.queue,
            metrics,
            ended=lambda: server.leave(),
            ready=lambda: announce({"event": "ready", "model": name}),
            slowdown=options.max_slowdown,
        )
        limits = Limits(options.timeout, options.read_timeout, options.max_body)
        host, port = listener.getsockname()[:2]
        loopback = ipaddress.ip_address(host).is_loopback
        own = [options.host] if loopback else [options.host, socket.gethostname()]
        hosts = Hosts(loopback, options.key is not None, own, options.allowed_host)
        app = App(
            name,
            f"fp_{_digest(bundle)[:10]}",
            reader,
            scheduler,
            metrics,
            limits,
            hosts,
            options.key,
            say,
            Origins(options.allow_origin),
        )
        server = Server(app, scheduler, options.grace, options.read_timeout)
        say(f"Starting server on port {port} with model '{name}'...")
        if options.key is None and not loopback:
            say(f"warning: anyone who can reach {host} can use this model; set {KEY_VARIABLE} to require a key")
        address = f"[{host}]" if ":" in host else host
        if not LIBRARIES.keys() <= ASSETS.keys():
            say("the page shows answers as plain text; run `make page` to install its Markdown libraries")
        say(f"OpenAI API Server starting on http://{address}:{port}")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)  # uvicorn restores it at the end; a signal is no failure
        announce({"event": "listening", "host": host, "port": port})
        scheduler.start()
        server.run([listener])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a signal during exit would change the exit code
    scheduler.join(timeout=1.0)
    if prompt_cache is not None:
        prompt_cache.close()
    if scheduler.failure is not None:
        raise scheduler.failure


class Server(uvicorn.Server):
    """A uvicorn server that stops together with the scheduler."""

    def __init__(self, app: Any, scheduler: Scheduler, grace: float, read_timeout: int) -> None:
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
            timeout_graceful_shutdown=int(grace) + 3,
        )
        super().__init__(config)
        self._scheduler, self._grace = scheduler, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal starts a graceful shutdown; the second one forces it."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    def leave(self) -> None:
        """Stops the server after the scheduler has ended."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._scheduler.stop(0.0 if self.force_exit else self._grace)
        await super().shutdown(sockets)


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


def _digest(bundle: Bundle) -> str:
    """The digest of the bundle's files."""
    return hashlib.sha256(json.dumps(bundle.manifest["files"], sort_keys=True).encode()).hexdigest()
