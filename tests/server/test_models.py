"""Names come and go while requests run."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from served import model_of, serving
from tritonclient.utils import InferenceServerException

from flashdiff.engines.runtime.fake import FakeComponents
from flashdiff.errors import BundleError, NotFoundError, OverloadedError
from flashdiff.server import models as models_module
from flashdiff.server.client import Client, ServerError
from flashdiff.server.models import Embeddings, Model, Models
from flashdiff.server.names import ModelIdentity


def _bundle(repository: Path, name: str) -> Path:
    folder = repository / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(name)
    return folder


def _opener(opened: list[str]) -> Callable[[Path], Model]:
    def open_model(folder: Path) -> Model:
        opened.append(folder.name)
        return model_of(FakeComponents(), ModelIdentity(folder.name, _hash(folder), "fake", "fake", "fp32"))

    return open_model


def _hash(folder: Path) -> str:
    return (folder / "manifest.json").read_text()


def _models(repository: Path, opened: list[str]) -> Models:
    return Models({}, repository, opener=_opener(opened), identify=_hash)


def test_the_first_model_is_the_default_and_an_unknown_name_is_refused_with_the_known_ones() -> None:
    models = Models({"a": model_of(FakeComponents()), "b": model_of(FakeComponents())})
    assert models.get() is models.get("a")
    with pytest.raises(NotFoundError, match="model: 'c' is not allowed; this server has a, b"):
        models.get("c")
    with pytest.raises(NotFoundError, match="this server has none"):
        Models({}).get()


def test_a_name_loads_from_the_repository_an_alias_follows_its_link_and_nothing_else_is_opened(tmp_path: Path) -> None:
    opened: list[str] = []
    for name in ("v1", "v2"):
        _bundle(tmp_path / "repository", name)
    _bundle(tmp_path, "outside")
    (tmp_path / "repository" / "latest").symlink_to("v1")
    models = _models(tmp_path / "repository", opened)
    assert models.available() == ["latest", "v1", "v2"]
    models.load("v1")
    models.load("latest")
    assert models.get("latest") is models.get("v1")

    (tmp_path / "repository" / "latest").unlink()
    (tmp_path / "repository" / "latest").symlink_to("v2")
    models.load("latest")
    assert models.get("latest").identity.name == "v2"
    models.unload("v1")
    assert list(models.served) == ["latest"]
    for bad in ("../outside", "", "none", "/etc"):
        with pytest.raises(NotFoundError, match="the repository has latest, v1, v2"):
            models.load(bad)
    with pytest.raises(NotFoundError):
        models.unload("v1")
    assert opened == ["v1", "v2"]


def test_a_bundle_that_does_not_open_or_does_not_fit_leaves_what_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _bundle(tmp_path, "v1")

    def broken(_: Path) -> Model:
        raise BundleError("damaged")

    models = Models({"a": model_of(FakeComponents())}, tmp_path, opener=broken, identify=_hash)
    with pytest.raises(BundleError):
        models.load("v1")
    (folder / "weights").write_bytes(bytes(1000))
    monkeypatch.setattr(models_module, "_free_memory", lambda: 1500)
    with pytest.raises(OverloadedError, match=r"opening 'v1' takes about .* unload a model first"):
        models.load("v1")
    assert list(models.served) == ["a"]


def test_free_memory_is_the_containers_where_it_has_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_module, "_CGROUP", tmp_path)
    machine = models_module._free_memory()
    assert machine
    assert machine > 10**8
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 850\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert models_module._free_memory() == 1000 - 900 + 50
    (tmp_path / "memory.max").write_text("max\n")
    assert models_module._free_memory() == pytest.approx(machine, rel=0.5)


def test_switching_a_model_under_fire_loses_no_request(tmp_path: Path) -> None:
    """The folder's content changes between loads, so every load opens another model."""
    folder, opened = _bundle(tmp_path, "m"), list[str]()
    models = _models(tmp_path, opened)
    models.load("m")
    with serving(FakeComponents(), models=models) as running, Client(running.address) as client:
        failures: list[Exception] = []
        expected = client.generate("x", seed=1, timeout_s=10).images

        def ask() -> None:
            for _ in range(30):
                try:
                    assert client.generate("x", seed=1, timeout_s=10).images == expected
                except Exception as error:
                    failures.append(error)

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        stock = triton.InferenceServerClient(running.address)
        for number in range(10):
            (folder / "manifest.json").write_text(str(number))
            stock.load_model("m")
        assert len(opened) == 11
        for thread in asking:
            thread.join(600)
        assert failures == []

        stock.unload_model("m")
        assert not stock.is_model_ready("m")
        assert [(model.name, model.state) for model in stock.get_model_repository_index().models] == [("m", "")]
        with pytest.raises(ServerError, match="NOT_FOUND"):
            client.generate("x", timeout_s=10)
        with pytest.raises(InferenceServerException, match=r"INTERNAL.*failed to load 'none'"):
            stock.load_model("none")
        stock.unload_model("none")  # as with Triton
        with pytest.raises(InferenceServerException, match="takes no parameters"):
            stock.load_model("m", config="{}")
        stock.close()


def test_without_a_repository_nothing_is_loaded_or_taken_away() -> None:
    with serving(FakeComponents()) as running:
        stock = triton.InferenceServerClient(running.address)
        for change, code in ((stock.load_model, "INTERNAL"), (stock.unload_model, "FAILED_PRECONDITION")):
            with pytest.raises(InferenceServerException, match="started without --repository") as caught:
                change("fake")
            assert caught.value.status() == f"StatusCode.{code}"
        assert stock.is_model_ready("fake")
        stock.close()


def test_the_default_stays_the_default_when_it_is_loaded_anew(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _bundle(tmp_path, name)
    first = {name: _opener([])(tmp_path / name) for name in ("a", "b")}
    models = Models(first, tmp_path, opener=_opener([]), identify=_hash)
    models.unload("a")
    assert models.get().identity.name == "b"
    models.load("a")
    assert models.get().identity.name == "a"


def test_embeddings_are_kept_up_to_their_bytes_the_least_used_go() -> None:
    kept = Embeddings(max_bytes=80)
    for text in ("a", "b"):
        kept.put(text, {"x": np.zeros(10, np.float32)})
    assert kept.get("a") is not None
    kept.put("c", {"x": np.zeros(10, np.float32)})
    assert kept.get("b") is None
    assert kept.get("a") is not None
    assert kept.get("c") is not None
