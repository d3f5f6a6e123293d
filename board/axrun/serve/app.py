"""The ASGI application: routes, authentication, and the way from a request to its response."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axrun import VERSION
from axrun.errors import BadInput
from axrun.serve import ollama, tokens
from axrun.serve.answer import to_json
from axrun.serve.endpoint import Reply
from axrun.serve.errors import ApiError, sentence, stopped
from axrun.serve.exchange import JSON, Exchange, Gone, Receive, Send
from axrun.serve.field_kinds import request
from axrun.serve.hosts import Hosts
from axrun.serve.media import refuse_media
from axrun.serve.metrics import ServerMetrics
from axrun.serve.models import Models
from axrun.serve.ollama.fields import SHOW
from axrun.serve.ollama.models import show, tags
from axrun.serve.openapi import document
from axrun.serve.order import Order, Reader
from axrun.serve.origins import Origins
from axrun.serve.routes import WRITING
from axrun.serve.scheduler import READY
from axrun.serve.served import Served
from axrun.serve.turn import Event, Ticket
from axrun.serve.validate import Schema, parse, validate
from axrun.serve.writer import Piece

PAGE = Path(__file__).parent / "page"
SCRIPT = "text/javascript; charset=utf-8"
LIBRARIES = {f"/lib/{name}": (f"lib/{name}", SCRIPT) for name in ("markdown-it.js", "purify.js")}
ASSETS = {
    "/": ("index.html", "text/html; charset=utf-8"),
    **{f"/{path.name}": (path.name, "text/css; charset=utf-8") for path in sorted(PAGE.glob("*.css"))},
    **{f"/{path.name}": (path.name, SCRIPT) for path in sorted(PAGE.glob("*.js"))},
    **{path: asset for path, asset in LIBRARIES.items() if (PAGE / asset[0]).is_file()},
}
PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MODELS = "/v1/models/"
REALM = 'Bearer realm="axrun"'
ERROR_SECONDS = 1.0  # to send an error at a forced shutdown
GONE = object()
NO_ORIGINS = Origins()

Convert = Callable[[Reader, Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    """Limits of a request: `timeout` in seconds to generate the answer, `max_body` in bytes.

    `read_timeout`, in seconds, applies to receiving the body and to the client reading the rest of a finished answer.
    """

    timeout: float = 300.0
    read_timeout: float = 10.0
    max_body: int = 1 << 20


class App:
    """An ASGI application. `api_key` protects all routes except the page, /health and /openapi.json."""

    def __init__(
        self,
        models: Models,
        metrics: ServerMetrics,
        limits: Limits,
        hosts: Hosts,
        api_key: str | None = None,
        log: Callable[[str], None] = lambda line: None,
        origins: Origins = NO_ORIGINS,
    ) -> None:
        self._models, self._metrics, self._limits = models, metrics, limits
        self._hosts, self._api_key, self._log, self._origins = hosts, api_key, log, origins
        names = models.names
        self._document = to_json(document(names))
        self._requests = {path: request(endpoint.fields, names) for path, endpoint in WRITING.items()}
        self._converters: dict[str, tuple[Schema, Convert]] = {
            "/tokenize": (request(tokens.TOKENIZE, names), tokens.tokenize),
            "/detokenize": (request(tokens.DETOKENIZE, names), tokens.detokenize),
            "/api/show": (request(SHOW, names), show),
        }
        self._assets = {path: ((PAGE / name).read_bytes(), kind) for path, (name, kind) in ASSETS.items()}
        # path: (method, handler, needs the API key)
        self._routes: dict[str, tuple[str, Callable[[Exchange], Awaitable[None]], bool]] = {
            **dict.fromkeys(WRITING, ("POST", self._write, True)),
            **dict.fromkeys(self._converters, ("POST", self._convert, True)),
            "/v1/models": ("GET", self._list_models, True),
            **{f"{MODELS}{name}": ("GET", self._one_model, True) for name in names},
            "/api/tags": ("GET", self._tags, True),
            "/api/version": ("GET", self._version, True),
            "/metrics": ("GET", self._show_metrics, True),
            "/health": ("GET", self._health, False),
            "/openapi.json": ("GET", self._openapi, False),
            **dict.fromkeys(ASSETS, ("GET", self._page, False)),
        }

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        exchange, came = Exchange(scope, receive, send), time.monotonic()
        if exchange.path.startswith(ollama.PREFIX):
            exchange.form = ollama.error_of
        try:
            await self._answer(exchange)
        except Gone:
            return
        except ApiError as error:
            await exchange.refuse(error)
        except asyncio.CancelledError:  # a forced shutdown; a response that has begun is cut off
            if not exchange.status:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(exchange.refuse(stopped()), ERROR_SECONDS)
        except Exception:
            traceback.print_exc()
            if exchange.status:
                raise
            await exchange.refuse(ApiError(500, "Internal error; see the server log.", "internal_error"))
        finally:
            self._account(exchange, time.monotonic() - came)

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.has("host"):  # optional in HTTP/1.0
            self._hosts.check(exchange.header("host"))
        exchange.always = self._origins.headers(exchange)
        if exchange.method == "OPTIONS" and exchange.always:  # a preflight of an allowed origin
            await exchange.reply(200, b"")
            return
        if exchange.path not in self._routes:
            if exchange.path.startswith(MODELS):
                self._models.find(exchange.path[len(MODELS) :])
            raise ApiError(404, "No such route; /openapi.json lists all routes.", "unknown_url")
        method, handler, guarded = self._routes[exchange.path]
        if exchange.method != method:
            allowed = {"allow": method if method == "POST" else f"{method}, HEAD"}
            raise ApiError(405, f"{exchange.path} accepts {method} only.", "method_not_allowed", headers=allowed)
        if guarded and self._api_key is not None:
            self._authenticate(exchange.header("authorization"), self._api_key)
        await handler(exchange)

    def _authenticate(self, given: str, key: str) -> None:
        """https://www.rfc-editor.org/rfc/rfc6750"""
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip(" ").encode("latin-1"), key.encode()):
            challenge = f'{REALM}, error="invalid_token"' if given else REALM
            words = "Wrong or missing API key; send Authorization: Bearer KEY."
            raise ApiError(401, words, "invalid_api_key", headers={"www-authenticate": challenge})

    async def _body(self, exchange: Exchange) -> bytes:
        """The body of a request. Raises ApiError if it is not JSON by its headers, or too large."""
        if exchange.header("content-type").partition(";")[0].strip().lower() != JSON:
            raise ApiError(415, f"Send the body as Content-Type: {JSON}.", "unsupported_media_type")
        coding = exchange.header("content-encoding").lower()
        if coding not in ("", "identity"):
            words = f"Content-Encoding {coding[:40]!a} is not supported; send the body without encoding."
            raise ApiError(415, words, "unsupported_media_type")
        return await exchange.body(self._limits.max_body, self._limits.read_timeout)

    async def _write(self, exchange: Exchange) -> None:
        limits = self._limits
        body = await self._body(exchange)
        exchange.patience(limits.timeout + limits.read_timeout)
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + limits.timeout
        served, order, reply = await loop.run_in_executor(None, self._read, exchange.path, body)
        await self._models.enter(served, limits.timeout)
        try:
            if order.choices:
                await self._generate(exchange, served, order, reply, deadline)
            else:  # Ollama's way to load a model
                await exchange.reply(200, reply.whole([]))
        finally:
            self._models.leave(served)

    async def _generate(self, exchange: Exchange, served: Served, order: Order, reply: Reply, deadline: float) -> None:
        loop, limits, scheduler = asyncio.get_running_loop(), self._limits, served.scheduler
        assert scheduler is not None
        events: asyncio.Queue[Any] = asyncio.Queue()

        def arrived(event: Event) -> None:
            events.put_nowait(event)
            if event is None or isinstance(event, ApiError):  # complete: only the client still has to read it
                exchange.patience(limits.read_timeout)

        def deliver(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed after a forced shutdown
                loop.call_soon_threadsafe(arrived, event)

        ticket = Ticket(deque(order.choices), deliver, deadline)
        scheduler.submit(ticket)
        exchange.patience(limits.timeout + limits.read_timeout, keep=True)
        watcher = asyncio.ensure_future(exchange.gone())
        watcher.add_done_callback(lambda _: events.put_nowait(GONE))
        send = self._stream if order.stream else self._whole
        try:
            await send(exchange, reply, _pieces(events))
            served.metrics.answered(time.monotonic() - ticket.came)
        finally:
            watcher.cancel()
            scheduler.cancel(ticket)

    def _read(self, path: str, body: bytes) -> tuple[Served, Order, Reply]:
        """The model of a request, what it asks for, and the response to fill in. Raises ApiError."""
        endpoint, (served, given) = WRITING[path], self._valid(path, self._requests[path], body)
        order = endpoint.read(_reader(served), given)
        return served, order, endpoint.reply(served.name, served.fingerprint, given, order)

    def _valid(self, path: str, schema: Schema, body: bytes) -> tuple[Served, Any]:
        """The model of a request, and the validated body. Raises ApiError."""
        given = parse(body)
        if path.startswith(ollama.PREFIX):
            given = ollama.untagged(given)
        name = given.get("model") if isinstance(given, dict) else None
        served = self._models.find(name if isinstance(name, str) else None)
        refuse_media(given)
        return served, validate(given, schema)

    async def _convert(self, exchange: Exchange) -> None:
        """Text to token ids and back, and what else needs no slot."""
        body, (rules, convert) = await self._body(exchange), self._converters[exchange.path]

        def converted() -> dict[str, Any]:
            served, given = self._valid(exchange.path, rules, body)
            return convert(_reader(served), given)

        answer = await asyncio.get_running_loop().run_in_executor(None, converted)
        await exchange.reply(200, to_json(answer))

    async def _whole(self, exchange: Exchange, reply: Reply, pieces: AsyncIterator[Piece]) -> None:
        await exchange.reply(200, reply.whole([piece async for piece in pieces]))

    async def _stream(self, exchange: Exchange, reply: Reply, pieces: AsyncIterator[Piece]) -> None:
        try:
            async for piece in pieces:
                if not exchange.status:  # until the first token, an error can still set the status
                    await exchange.begin(200, reply.media, STREAM_HEADERS)
                for data in reply.events(piece):
                    await exchange.send(data)
        except ApiError as error:
            if not exchange.status:
                raise
            await exchange.send(reply.failed(error), more=False)
        else:
            await exchange.send(reply.end(), more=False)

    async def _list_models(self, exchange: Exchange) -> None:
        listed = [served.json() for served in self._models.listed]
        await exchange.reply(200, to_json({"object": "list", "data": listed}))

    async def _one_model(self, exchange: Exchange) -> None:
        await exchange.reply(200, to_json(self._models.find(exchange.path[len(MODELS) :]).json()))

    async def _tags(self, exchange: Exchange) -> None:
        await exchange.reply(200, to_json(tags((served.name, served.bundle) for served in self._models.listed)))

    async def _version(self, exchange: Exchange) -> None:
        await exchange.reply(200, to_json({"version": VERSION}))

    async def _health(self, exchange: Exchange) -> None:
        models = self._models
        state, first = models.state, models.first
        known = {"model": first.name, "context_length": first.bundle.kv_cache_len}
        if len(models.listed) > 1:
            known["loaded"] = [served.name for served in models.listed if served.loaded]
        body = {"status": state, **known, **models.load_figures}
        await exchange.reply(200 if state == READY else 503, to_json(body))

    async def _show_metrics(self, exchange: Exchange) -> None:
        await exchange.reply(200, self._metrics.text(), METRICS_TYPE)

    async def _openapi(self, exchange: Exchange) -> None:
        await exchange.reply(200, self._document)

    async def _page(self, exchange: Exchange) -> None:
        content, kind = self._assets[exchange.path]
        await exchange.reply(200, content, kind, PAGE_HEADERS)

    def _account(self, exchange: Exchange, seconds: float) -> None:
        known = exchange.path in self._routes
        self._metrics.request(exchange.path if known else "other", exchange.status)
        if exchange.method == "POST" or exchange.status >= 400:
            path = exchange.path if known else ascii(exchange.path)[:80]
            self._log(f"{exchange.method} {path} {exchange.status or 'disconnected'} {seconds:.3f} s")


def _reader(served: Served) -> Reader:
    """Raises ApiError if the bundle's tokenizer or settings are damaged."""
    try:
        return served.reader
    except BadInput as error:
        raise ApiError(500, sentence(error), "model_failed", "model") from None


async def _pieces(events: asyncio.Queue[Any]) -> AsyncIterator[Piece]:
    """Raises ApiError if the scheduler fails, Gone if the client disconnected."""
    while True:
        event = await events.get()
        if event is GONE:
            raise Gone
        if isinstance(event, ApiError):
            raise event
        if event is None:
            return
        yield event._replace(at=time.monotonic())
