"""The model repository when its disk or an engine does not do what it should."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import httpx2 as httpx
import pytest
import tritonclient.grpc as triton
from served import FakeComponents, Running, model_of, serving, until
from tritonclient.utils import InferenceServerException

from flashdiff.errors import RepositoryError
from flashdiff.server import repository as repository_module
from flashdiff.server.app import Listen
from flashdiff.server.client import Client
from flashdiff.server.models import Model, Models
from flashdiff.server.names import ModelIdentity


def _folder(repository: Path, *names: str) -> Path:
    for name in names:
        (repository / name).mkdir(parents=True)
        (repository / name / "manifest.json").write_text(name)
    return repository


def _identify(folder: Path) -> str:
    return (folder / "manifest.json").read_text()


def _open(folder: Path) -> Model:
    return model_of(FakeComponents(), ModelIdentity(folder.name, _identify(folder), "fake", "fake", "fp32"))


@contextmanager
def _serving(repository: Path, opener: Callable[[Path], Model] = _open) -> Iterator[tuple[Running, triton.InferenceServerClient]]:
    models = Models({"a": model_of(FakeComponents())}, repository, opener=opener, identify=_identify)
    with (
        serving(FakeComponents(), Listen(port=0, http_port=0), models) as running,
        triton.InferenceServerClient(running.address) as stock,
    ):
        yield running, stock


@pytest.mark.parametrize("trouble", ["gone", "no folder", "unreadable"])
def test_a_repository_that_cannot_be_read_is_said_and_what_is_served_stays(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repository = _folder(tmp_path / "repository", "v1")
    with _serving(repository) as (running, stock):
        if trouble == "unreadable":  # the tests may run as root, which may read every file

            def refuse(_: Path) -> Iterator[Path]:
                raise PermissionError(13, "Permission denied")

            monkeypatch.setattr(Path, "iterdir", refuse)
        else:
            rmtree(repository)
            if trouble == "no folder":
                repository.write_text("x")
        for call in (stock.get_model_repository_index, lambda: stock.load_model("v1")):
            with pytest.raises(InferenceServerException, match="repository cannot be read") as caught:
                call()
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
        for path in ("/v2/repository/index", "/v2/repository/models/v1/load"):
            answer = httpx.post(running.url + path)
            assert answer.status_code == 503
            assert "repository cannot be read" in answer.json()["error"]
        assert httpx.post(f"{running.url}/v2/repository/index", json={"ready": True}).json()[0]["name"] == "a"
        stock.unload_model("v1")
        with Client(running.address) as client:
            assert client.generate("x", timeout_s=60).images
    assert not [record for record in caplog.records if record.exc_info]


def test_a_bundle_that_vanishes_while_it_is_loaded_is_said(tmp_path: Path) -> None:
    def vanish(folder: Path) -> Model:
        rmtree(folder)
        return _open(folder)

    models = Models({}, _folder(tmp_path, "v1"), opener=vanish, identify=_identify)
    with pytest.raises(RepositoryError, match="v1 cannot be read: No such file"):
        models.load("v1")


def test_a_folder_that_cannot_be_looked_into_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models({}, _folder(tmp_path, "v1", "v2"), opener=_open, identify=_identify)
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.parent.name == "v1":
            raise PermissionError(13, "Permission denied")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    assert models.available() == ["v2"]


def test_a_disk_that_hangs_delays_no_other_call_and_takes_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, iterdir = threading.Event(), Path.iterdir

    def hang(path: Path) -> Iterator[Path]:
        assert disk.wait(600)
        return iterdir(path)

    with _serving(_folder(tmp_path, "v1")) as (running, stock), Client(running.address) as client:
        monkeypatch.setattr(Path, "iterdir", hang)
        monkeypatch.setattr(repository_module, "_READ_S", 0.05)
        for _ in range(3):
            with pytest.raises(InferenceServerException, match="could not be read within") as caught:
                stock.get_model_repository_index()
            assert caught.value.status() == "StatusCode.UNAVAILABLE"
            assert client.generate("x", timeout_s=60).images
        assert sum(thread.name == "flashdiff-repository" for thread in threading.enumerate()) == 1
        monkeypatch.setattr(repository_module, "_READ_S", 60.0)
        disk.set()
        assert {model.name for model in stock.get_model_repository_index().models} == {"a", "v1"}


class Engine:
    """Opens models; hangs on those that are called so."""

    def __init__(self) -> None:
        self.comes_back, self.opened = threading.Event(), list[str]()

    def open(self, folder: Path) -> Model:
        if folder.name.startswith("hung"):
            assert self.comes_back.wait(600)
        self.opened.append(folder.name)
        return _open(folder)


def test_a_load_that_hangs_is_given_up_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine()
    with _serving(_folder(tmp_path, "hung", "v1"), engine.open) as (running, stock):
        monkeypatch.setattr(repository_module, "_LOAD_S", 0.05)
        with pytest.raises(InferenceServerException, match="failed to load 'hung': it has not come back") as caught:
            stock.load_model("hung")
        assert caught.value.status() == "StatusCode.INTERNAL"
        monkeypatch.setattr(repository_module, "_LOAD_S", 60.0)
        stock.load_model("v1")
        with Client(running.address) as client:
            assert client.generate("x", model="v1", timeout_s=60).images
        engine.comes_back.set()
        until(lambda: engine.opened == ["v1", "hung"])
        until(lambda: not any(thread.name == "flashdiff-repository" for thread in threading.enumerate()))
        assert list(running.server.models.served) == ["a", "v1"]  # it was given up, so it is not served
    assert any(record.levelno == logging.ERROR and "given up" in record.getMessage() for record in caplog.records)


def test_no_more_loads_hang_than_the_memory_is_good_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine()
    with _serving(_folder(tmp_path, "hung", "v1"), engine.open) as (_, stock):
        monkeypatch.setattr(repository_module, "_LOAD_S", 0.05)
        for _ in range(3):
            with pytest.raises(InferenceServerException, match="has not come back"):
                stock.load_model("hung")
        monkeypatch.setattr(repository_module, "_LOAD_S", 60.0)
        with pytest.raises(InferenceServerException, match="3 loads hang already: restart the server"):
            stock.load_model("v1")
        engine.comes_back.set()

        def loads() -> bool:
            try:
                stock.load_model("v1")
            except InferenceServerException:
                return False
            return True

        until(loads)


def test_a_load_goes_on_when_its_caller_leaves(tmp_path: Path) -> None:
    engine = Engine()
    with _serving(_folder(tmp_path, "hung"), engine.open) as (running, stock):
        with pytest.raises(InferenceServerException):
            stock.load_model("hung", client_timeout=0.05)
        engine.comes_back.set()
        until(lambda: "hung" in running.server.models.served)
