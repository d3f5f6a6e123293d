"""Several bundles in one server: names, loading at the first use, unloading when memory is short."""

from __future__ import annotations

import asyncio
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from axrun.cli import main
from axrun.format.bundle import Bundle
from axrun.load import Loading, silent
from axrun.memory import needs, refuse
from axrun.serve.metrics import Metrics, ServerMetrics
from axrun.serve.models import Models
from axrun.serve.names import names_of
from axrun.serve.served import Served
from axrun.serve.server import Options
from axrun.serve.slots import SPARE
from tests.serve.server import Server, Start

SLOTS = 2


@pytest.fixture(scope="module")
def server(bundle_s8: Path, bundle_fp32: Path, embedding_bundle: Path) -> Iterator[Server]:
    """Two bundles in folders of the same name, and one for embeddings."""
    aliases = f"small={bundle_s8}", f"exact={bundle_fp32}", f"text/embed={embedding_bundle}"
    flags = [word for alias in aliases for word in ("--alias", alias)]
    server = Server([bundle_s8, bundle_fp32, embedding_bundle], *flags).ready()
    yield server
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def complete(server: Server, model: str | None, **body: Any) -> Any:
    answer = server.client.post("/v1/completions", json={"model": model, "prompt": "1+1=", "temperature": 0, **body})
    assert answer.headers["content-type"] == "application/json", f"{answer.text}\n" + "\n".join(server.lines[-9:])
    return answer.json()


def clear(path: Path) -> None:
    """Fills a file with zeros; its size stays, which is compared when a bundle is opened."""
    path.write_bytes(bytes(path.stat().st_size))


def loaded(server: Server) -> list[str]:
    return [entry["id"] for entry in server.client.get("/v1/models").json()["data"] if entry["loaded"]]


def load(server: Server) -> Any:
    return server.client.get("/health").json()


def test_models_are_loaded_at_their_first_use(server: Server, embedding_checkpoint: Path) -> None:
    listed = server.client.get("/v1/models").json()["data"]
    assert [(entry["id"], entry["aliases"], entry["loaded"]) for entry in listed] == [
        ("small", [], True),
        ("exact", [], False),
        ("bundle", ["text/embed"], False),
    ]
    assert [(entry["family"], entry["weight_type"], entry["bits"], entry["context_length"]) for entry in listed] == [
        ("qwen2", "s8", 8, 255),
        ("qwen2", "fp32", 32, 255),
        ("qwen3", "fp32", 32, 255),
    ]
    assert [(entry["text"], entry["embeddings"]) for entry in listed] == [(True, False), (True, False), (False, True)]
    assert server.client.post("/tokenize", json={"model": "bundle", "prompt": "1"}).json()["count"] == 2  # and the end
    assert loaded(server) == ["small"]
    assert complete(server, None)["model"] == complete(server, "small")["model"] == "small"
    assert complete(server, "exact")["model"] == "exact"
    assert loaded(server) == ["small", "exact"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        made = [client.embeddings.create(model=name, input="x") for name in ("bundle", "text/embed")]
        assert client.models.retrieve("text/embed").id == "bundle"
    assert {each.model for each in made} == {"bundle"}
    assert made[0].data == made[1].data
    health = server.client.get("/health").json()
    assert (health["status"], health["loaded"], health["slots"]) == ("ok", ["small", "exact", "bundle"], 12)
    tags = server.client.get("/api/tags").json()["models"]
    assert [entry["name"] for entry in tags] == ["small:latest", "exact:latest", "bundle:latest"]
    line = "models: small (loaded now); at their first use: exact, bundle; aliases: text/embed = bundle"
    assert line in server.lines


def test_answers_are_those_of_a_server_of_its_own(server: Server, server_fp32: Server) -> None:
    alone = server_fp32.complete("who are you?", max_tokens=20)["choices"]
    assert complete(server, "exact", prompt="who are you?", max_tokens=20)["choices"] == alone
    with ThreadPoolExecutor(6) as pool:
        both = list(pool.map(lambda name: complete(server, name)["choices"], ["exact", "small"] * 4))
    assert both == both[:2] * 4


def test_an_unknown_model(server: Server) -> None:
    for answer in (
        server.client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}),  # the folder of two of them
        server.client.post("/tokenize", json={"model": "qwen2", "content": "x"}),
        server.client.get("/v1/models/qwen2"),
    ):
        words = "No such model; this server has: small, exact, bundle, text/embed."
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, words)


def test_metrics_have_the_model(server: Server) -> None:
    complete(server, "exact")
    metrics = server.metrics()
    assert metrics['axrun_slots{model="exact"}'] == 4
    assert metrics['axrun_tokens_total{kind="written",model="exact"}'] > 0
    assert metrics['axrun_requests_total{path="/v1/completions",status="200"}'] > 0
    assert metrics['axrun_model_info{model="bundle"}'] == 1


class TestMemory:
    """Room for one of two bundles."""

    @pytest.fixture
    def begin(self, monkeypatch: pytest.MonkeyPatch, start: Start) -> Callable[..., Server]:
        monkeypatch.setattr(Server, "program", ("-m", "tests.serve.small_memory"))

        def begin(
            bundles: Sequence[Path],
            room_for: Path,
            *flags: object,
            slots: int = SLOTS,
            full: int = 0,
            **environment: str,
        ) -> Server:
            """With room for `full` of the slots of a bundle, all of them if it is 0."""
            aliases = [
                word for name, path in zip("abc", bundles, strict=False) for word in ("--alias", f"{name}={path}")
            ]
            free = needs(Bundle.open(room_for), "ax", full or slots).total + SPARE + 4096
            server: Server = start(bundles, "--slots", slots, *aliases, *flags, FREE=str(free), **environment)
            return server.ready()

        return begin

    def test_the_least_recently_used_is_unloaded(
        self, begin: Callable[..., Server], bundle_s8: Path, bundle_fp32: Path
    ) -> None:
        server = begin([bundle_s8, bundle_fp32], bundle_fp32)
        first = complete(server, "a")["choices"]
        for _ in range(2):
            assert complete(server, "b")["model"] == "b"
            assert loaded(server) == ["b"]
            assert [name for name in server.metrics() if "axrun_slots{" in name] == ['axrun_slots{model="b"}']
            assert f"{bundle_s8}/" not in Path(f"/proc/{server.process.pid}/maps").read_text()
            assert complete(server, "a")["choices"] == first
            assert loaded(server) == ["a"]
        assert server.stop() == 0
        assert [line for line in server.lines if line.startswith("unloaded")] == [
            f"unloaded model '{name}'" for name in ("a", "b", "a", "b")
        ]

    def test_running_answers_are_finished_first(
        self, begin: Callable[..., Server], bundle_s8: Path, tmp_path: Path, endless: dict[str, int]
    ) -> None:
        """Requests for either model that come meanwhile wait, and all are answered."""
        copied = shutil.copytree(bundle_s8, tmp_path / bundle_s8.name)
        server = begin([bundle_s8, copied], bundle_s8, HOLD="1")
        body = {"max_tokens": 50, "logit_bias": endless, "ignore_eos": True}
        with ThreadPoolExecutor(3) as pool:
            running = pool.submit(complete, server, "a", **body)
            server.until(lambda: load(server)["busy"] == 1)
            other = pool.submit(complete, server, "b")
            server.wait_for("model 'a' is unloaded after its requests, to make room for 'b'")
            again = pool.submit(complete, server, "a")
            server.until(lambda: load(server)["waiting"] == 2)
            assert loaded(server) == ["a"]
            server.process.send_signal(signal.SIGUSR1)
            assert running.result(120)["usage"]["completion_tokens"] == 50
            assert other.result(120)["model"] == "b"
            assert again.result(120)["model"] == "a"
        assert server.stop() == 0
        unloaded = [line for line in server.lines if line.startswith("unloaded")]
        assert unloaded == ["unloaded model 'a'", "unloaded model 'b'"]

    def test_an_unloaded_model_is_freed_whatever_its_threads_keep(self, bundle_s8: Path, bundle_fp32: Path) -> None:
        """A thread drops the function that it ran only after the event loop goes on."""
        options, loading, metrics = Options(), Loading(threads=1), ServerMetrics(["a", "b"])
        listed = [
            Served(Bundle.open(path), [name], options, loading, Metrics(metrics, name), alone=False)
            for name, path in (("a", bundle_s8), ("b", bundle_fp32))
        ]
        kept = []

        class Executor(ThreadPoolExecutor):
            def submit(self, *given: Any, **named: Any) -> Any:
                kept.append(given)
                return super().submit(*given, **named)

        async def freed() -> bool:
            asyncio.get_running_loop().set_default_executor(Executor(2))
            models = Models(listed, 1, refuse, silent, silent, lambda: None)
            models.begin()
            await models.enter(listed[0], 60)
            models.leave(listed[0])
            scheduler = weakref.ref(listed[0].scheduler)
            await models._unload(listed[0])
            return scheduler() is None

        assert asyncio.run(freed())
        assert kept

    def test_a_bundle_that_cannot_fit_unloads_nothing(
        self, begin: Callable[..., Server], bundle_s8: Path, bundle_long: Path
    ) -> None:
        server = begin([bundle_s8, bundle_long], bundle_s8)
        error = complete(server, "b")["error"]
        assert error["code"] == "insufficient_memory"
        assert error["message"].startswith("b cannot be loaded: the bundle needs ")
        assert complete(server, "a")["model"] == "a"
        assert server.stop() == 0
        assert not [line for line in server.lines if line.startswith("unloaded")]

    @pytest.mark.parametrize("first", [0, 1])
    def test_slots_that_do_not_fit_share_what_is_free(
        self, begin: Callable[..., Server], bundle_s8: Path, bundle_long: Path, first: int
    ) -> None:
        """As in a server of its own: a context of each slot does not fit, one does."""
        paths = [bundle_s8, bundle_long] if first else [bundle_long, bundle_s8]
        server = begin(paths, bundle_long, slots=64, full=1)
        for name in "ab":
            assert complete(server, name)["model"] == name
        assert loaded(server) == ["b"]
        assert server.stop() == 0
        assert [line for line in server.lines if "fit into the free memory, fewer than 64 slots of 8191" in line]

    def test_memory_that_another_model_has_yet_to_write_is_not_free(
        self, begin: Callable[..., Server], bundle_s8: Path, bundle_long: Path
    ) -> None:
        """Free memory here does not shrink: as if no block had been written."""
        server = begin([bundle_long, bundle_s8], bundle_long, slots=16)
        assert complete(server, "b")["model"] == "b"
        assert loaded(server) == ["b"]
        assert server.stop() == 0

    def test_shutdown_ends_requests_that_wait_for_a_model(
        self, begin: Callable[..., Server], bundle_long: Path, tmp_path: Path, endless: dict[str, int]
    ) -> None:
        copied = shutil.copytree(bundle_long, tmp_path / bundle_long.name)
        server = begin([bundle_long, copied], bundle_long, "--grace", "0.2", HOLD="1")
        body = {"max_tokens": 8000, "logit_bias": endless, "ignore_eos": True}
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(complete, server, "a", **body)
            server.until(lambda: load(server)["busy"] == 1)
            other = pool.submit(complete, server, "b")
            server.until(lambda: load(server)["waiting"] == 1)
            server.process.send_signal(signal.SIGTERM)
            assert other.result(60)["error"]["code"] == "service_unavailable"
            server.process.send_signal(signal.SIGUSR1)
            assert running.result(60)["error"]["code"] == "service_unavailable"
        assert server.stop() == 0
        assert not [line for line in server.lines if "Traceback" in line or "destroyed" in line]


def test_a_damaged_bundle_leaves_the_others_alone(bundle_s8: Path, tmp_path: Path, start: Start) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle_s8, damaged)
    clear(damaged / "qwen2_post.axmodel")
    server = start([bundle_s8, damaged]).ready()
    for _ in range(2):
        error = complete(server, "damaged")["error"]
        assert error["code"] == "model_failed"
        assert "damaged cannot be loaded: " in error["message"]
    assert complete(server, None)["model"] == "tiny"
    assert server.stop() == 0


def test_bundles_that_change_while_the_server_runs(
    bundle_s8: Path, bundle_fp32: Path, tmp_path: Path, start: Start
) -> None:
    """A deleted file, another build, and then the same files again; also of a bundle that is loaded."""
    first, second, same = tmp_path / "first", tmp_path / "second", tmp_path / "same"
    for folder in (first, second, same):
        shutil.copytree(bundle_s8, folder)
    server = start([first, second], "--timeout", 20).ready()
    answer = complete(server, "first")["choices"]

    (second / "qwen2_post.axmodel").unlink()
    error = complete(server, "second")["error"]
    assert error["code"] == "model_failed"
    assert error["message"].endswith("qwen2_post.axmodel is missing. Build or copy the bundle again.")

    shutil.rmtree(second)
    assert server.client.get("/api/tags").json()["models"][1]["modified_at"] == "1970-01-01T00:00:00Z"
    shutil.copytree(bundle_fp32, second)
    error = complete(server, "second")["error"]
    assert error["message"].endswith("has changed since the server was started. Restart the server.")

    shutil.rmtree(second)
    shutil.rmtree(first)
    same.rename(second)
    assert complete(server, "second")["choices"] == complete(server, "first")["choices"] == answer
    assert server.stop() == 0
    assert not [line for line in server.lines if "Traceback" in line]


def test_a_damaged_first_bundle_ends_the_server(bundle_s8: Path, tmp_path: Path, start: Start) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle_s8, damaged)
    clear(damaged / "qwen2_post.axmodel")
    server = start([damaged, bundle_s8])
    assert server.process.wait(60) == 2
    server.stop()
    assert [line for line in server.lines if line.startswith("error: ") and "qwen2_post.axmodel" in line]


def test_an_alias_of_the_only_bundle(bundle_s8: Path, start: Start) -> None:
    server = start(bundle_s8, "--alias", f"gpt-4o={bundle_s8}").ready()
    assert complete(server, "gpt-4o")["model"] == complete(server, "qwen2")["model"] == "qwen2"
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("folders", "aliases", "expected"),
    [
        (["x/a", "x/b"], [[], ["c"]], [("a",), ("b", "c")]),
        (["x/a", "y/a"], [[], ["c"]], [("a",), ("c",)]),  # one folder without an alias has their name
        (["x/a", "y/a"], [["c", "d"], ["e"]], [("c", "d"), ("e",)]),
        (["x/a", "y/a", "z/b"], [["c"], ["a"], []], [("c",), ("a",), ("b",)]),
    ],
)
def test_the_main_name_comes_first(
    folders: list[str], aliases: list[list[str]], expected: list[tuple[str, ...]]
) -> None:
    assert names_of([Path(folder) for folder in folders], aliases) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["{s8}", "{s8}"], "a bundle is given twice"),
        (["{s8}", "{fp32}"], "several bundles are named tiny"),
        (["{s8}", "{fp32}", "--name", "x"], "--name is for one bundle"),
        (["{s8}", "--alias", "a=/nowhere"], "--alias is 'a=/nowhere', expected NAME=DIR"),
        (["{s8}", "--alias", "a b={s8}"], "expected NAME=DIR"),
        (["{s8}", "{fp32}", "--alias", "a={s8}", "--alias", "a={fp32}"], "with a new name"),
        (["{s8}", "/nowhere"], "no bundle folder /nowhere"),
    ],
)
def test_names_that_do_not_choose(
    bundle_s8: Path, bundle_fp32: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag.format(s8=bundle_s8, fp32=bundle_fp32) for flag in flags]
    assert main(["serve", *given, "--port", "0"]) == 2
    assert words in capsys.readouterr().err
