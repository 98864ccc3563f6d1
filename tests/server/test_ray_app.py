"""The Ray Serve application without Ray: its arguments, its policy, and what its proxies do to a call."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from served import model_of

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import BundleError, ConfigError, FlashdiffError
from flashdiff.server import ray_app
from flashdiff.server.models import Models
from flashdiff.server.ray_app import Options, PendingWork, app, deployed
from flashdiff.server.ray_proxy import REMAINING, add_to_server

_HERE, _OTHER = "1" * 64, "2" * 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, r"'bundles' is missing"),
        ({"bundles": ""}, r"bundles: give the folder of a bundle"),
        ({"bundle": "/models/a"}, r"unknown key 'bundle', did you mean 'bundles'\?"),
        ({"bundles": "/nowhere/a"}, r"/nowhere/a"),
        ({"bundles": "/a/model,/b/model"}, r"two bundles have the same folder name: model, model"),
        ({"bundles": ["/nowhere/a"], "allow_other_bundles": "perhaps"}, r"'allow_other_bundles' = 'perhaps'"),
        ({"bundles": "/nowhere/a", "tokens": "/nowhere/tokens"}, r"/nowhere"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said) as refused:
        app(arguments)
    assert "\n" not in str(refused.value)


def test_replicas_find_the_bundles_and_the_tokens_in_whatever_folder_they_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = Options(bundles=(Path("a"),), tokens=Path("tokens"))
    assert (options.bundles, options.tokens) == ((tmp_path / "a",), tmp_path / "tokens")


def test_without_ray_the_message_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"Ray Serve is not installed .*\[ray\]"):
        deployed(lambda: Models({}))


def test_a_replica_with_another_bundle_is_refused_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[Path, ...]] = []

    def open_models(folders: tuple[Path, ...], repository: None) -> Models:
        opened.append(folders)
        return Models({"student": model_of(FakeComponents())})

    monkeypatch.setattr(ray_app, "open_models", open_models)
    monkeypatch.setattr(ray_app, "parse_manifest", lambda folder: (None, SimpleNamespace(bundle_hash=_OTHER)))
    folders = (Path("/models/student"),)
    with pytest.raises(BundleError, match=f"student: this replica has bundle {_OTHER}, but .* deployed with {_HERE}"):
        ray_app._Bundles(folders, {"student": _HERE})()
    assert not opened
    assert ray_app._Bundles(folders, {})().served


def _context(pending_s: dict[str, float]) -> SimpleNamespace:
    return SimpleNamespace(aggregated_metrics={"pending_s": pending_s} if pending_s else {}, target_num_replicas=3)


@pytest.mark.parametrize(("pending_s", "replicas"), [({}, 3), ({"a": 0.0}, 0), ({"a": 1.5, "b": 0.5}, 4)])
def test_as_many_replicas_as_the_pending_work_takes(pending_s: dict[str, float], replicas: float) -> None:
    assert PendingWork(target_s=0.5)(_context(pending_s))[0] == replicas


@pytest.mark.parametrize("target_s", [0, -1, float("inf"), float("nan"), "1"])
def test_a_target_that_is_no_time_is_logged_and_changes_nothing(target_s: Any, caplog: pytest.LogCaptureFixture) -> None:
    policy = PendingWork(target_s)
    assert f"target_s: {target_s!r} is not allowed; give seconds above 0" in caplog.text
    assert policy(_context({"a": 5.0}))[0] == 3


class _ProxyContext:
    """A call's context in a proxy."""

    def __init__(self, remaining_s: float | None = None) -> None:
        self.remaining_s = remaining_s
        self.status, self.reason, self.trailers = 0, "", ()

    def time_remaining(self) -> float | None:
        return self.remaining_s

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", "Bearer x"), (REMAINING, "9"))

    def code(self) -> Any:
        return self.status

    def set_code(self, code: Any) -> None:
        self.status = code

    def details(self) -> str:
        return self.reason

    def set_details(self, details: str) -> None:
        self.reason = details

    def trailing_metadata(self) -> Any:
        return self.trailers

    def set_trailing_metadata(self, trailers: Any) -> None:
        self.trailers = trailers

    async def abort(self, code: Any, details: str, trailers: Any) -> None:
        self.aborted = (code, details, trailers)
        raise grpc.aio.AbortError


class _Proxy:
    """Ray's generic gRPC server, as far as our function knows it."""

    def __init__(self, *handlers: Any) -> None:
        self.service_handler_factory: Any = lambda number: handlers[number]
        self.added: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.added.append(self.service_handler_factory)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        pass


def _followed(handler: Any) -> Any:
    proxy = _Proxy(handler)
    before = proxy.service_handler_factory
    add_to_server(_Anything(), proxy)
    assert proxy.service_handler_factory is before
    return proxy.added[0](0)


class _Anything:
    def __getattr__(self, name: str) -> Any:
        return None


@pytest.mark.parametrize(("remaining_s", "metadata"), [(1.5, {REMAINING: "1500"}), (None, {})])
def test_a_call_takes_its_remaining_time_along(remaining_s: float | None, metadata: dict[str, str]) -> None:
    seen = {}

    async def handler(request: Any, context: Any) -> bytes:
        seen.update(context.invocation_metadata())
        return b"reply"

    assert asyncio.run(_followed(handler)(None, _ProxyContext(remaining_s))) == b"reply"
    assert seen == {"authorization": "Bearer x", **metadata}


def test_a_message_that_only_carries_a_status_is_not_sent() -> None:
    async def handler(request: Any, context: Any) -> AsyncIterator[bytes]:
        yield b"preview"
        yield b""  # an empty message is one
        context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
        context.set_details("full")
        context.set_trailing_metadata([("wait", "1")])
        yield b""

    messages, context = [], _ProxyContext()

    async def read() -> None:
        async for message in _followed(handler)(None, context):
            messages.append(message)

    with pytest.raises(grpc.aio.AbortError):
        asyncio.run(read())
    assert messages == [b"preview", b""]
    assert context.aborted == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("wait", "1"),))


@pytest.mark.parametrize(
    ("trailers", "code"),
    [((), grpc.StatusCode.UNAVAILABLE), ((("request_id", "1"),), grpc.StatusCode.INTERNAL)],
    ids=["of Ray", "of a replica"],
)
def test_a_replica_that_dies_is_unavailable(trailers: Any, code: grpc.StatusCode) -> None:
    async def handler(request: Any, context: Any) -> bytes:
        context.set_trailing_metadata(trailers)
        context.set_code(grpc.StatusCode.INTERNAL)
        context.set_details("The actor died.\nAt great length.")
        return b""

    context = _ProxyContext()
    with pytest.raises(grpc.aio.AbortError):
        asyncio.run(_followed(handler)(None, context))
    said, details, sent = context.aborted
    assert (said, sent) == (code, trailers)
    assert trailers or details == "the replica did not answer: The actor died."


def test_another_kind_of_proxy_is_refused() -> None:
    with pytest.raises(FlashdiffError, match=r"another kind of gRPC proxy than 2\.60"):
        add_to_server(_Anything(), SimpleNamespace())
