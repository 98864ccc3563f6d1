"""The torch backend: a bundle of safetensors and JSON that makes torch's own images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import MODELS
from torch import nn

from flashdiff.engines.backends.torch_runner import _sums_exactly_in_nhwc
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.generate import generate
from flashdiff.lora import load_fused
from flashdiff.tasks import check_order


@pytest.fixture(scope="module")
def bundle(tiny_base: Path, flash_lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("torch") / "student"
    loras = ((str(flash_lora), 1.0),)
    build_engine(BuildOptions(base=str(tiny_base), loras=loras, out=out, backend="torch", batch_sizes=(1, 2)), print)
    return out


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return open_bundle(bundle)


def test_it_makes_the_images_of_the_fused_model_in_torch(engine: Engine, tiny_base: Path, flash_lora: Path) -> None:
    _, model = load_fused(str(tiny_base), [(flash_lora, 1.0)], None)
    order = check_order(engine.spec, prompt="a dog", seed=3)
    np.testing.assert_array_equal(generate(engine, [order])[0][0], generate(model, [order])[0][0])


def test_it_keeps_the_builds_guidance_and_shift(tmp_path: Path) -> None:
    """The model's own files say others; the gate compares each part."""
    changes: dict[str, dict[str, Any]] = {"flux": {"guidance": 2.0}, "sd3": {"sampler": "ode", "shift": 1.0}}
    for family, options in changes.items():
        base, out = MODELS[family](tmp_path / family), tmp_path / f"{family}-bundle"
        build_engine(BuildOptions(base=str(base), out=out, backend="torch", batch_sizes=(1, 2), **options), print)
        assert max(read_manifest(out).max_error.values()) < 1e-4


def test_a_network_with_group_norm_keeps_its_layout_on_a_cpu() -> None:
    with_norm, without = (nn.Sequential(nn.Conv2d(4, 4, 3), layer) for layer in (nn.GroupNorm(2, 4), nn.ReLU()))
    assert not _sums_exactly_in_nhwc(with_norm)
    assert _sums_exactly_in_nhwc(without)


def test_it_holds_safetensors_json_and_vocabularies_alone(bundle: Path) -> None:
    assert {path.suffix for path in bundle.rglob("*") if path.is_file()} <= {".safetensors", ".json", ".txt"}


def test_outputs_belong_to_the_caller(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, *engine.spec.latent_shape(engine.spec.sizes[0])), dtype=np.float32)
    first = engine.call("decoder", {"latents": latents})["images"]
    kept = first.copy()
    engine.call("decoder", {"latents": latents[::-1]})
    np.testing.assert_array_equal(first, kept)


def test_rows_of_its_batches_are_close_and_not_said_to_be_equal(engine: Engine) -> None:
    assert not engine.manifest.rows_are_exact
    orders = [check_order(engine.spec, prompt=f"prompt {index}", seed=index) for index in range(2)]
    for order, together in zip(orders, generate(engine, orders), strict=True):
        alone = generate(engine, [order])[0][0]
        assert np.abs(alone.astype(int) - together[0]).max() <= 1
