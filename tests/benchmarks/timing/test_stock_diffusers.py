"""Stock diffusers: bases it cannot run, and machines that cannot compile it."""

from pathlib import Path

import pytest
from tiny import make_tiny_sdxl

from benchmarks.timing import stock_diffusers
from benchmarks.timing.configurations import Configuration
from benchmarks.timing.stock_diffusers import NewConfiguration, StockModel, check_stock_base, open_stock_variants
from flashdiff.errors import ConfigError


def test_without_a_compiler_eager_diffusers_is_measured_and_the_cause_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_stock(model: StockModel, *, device: str, compiled: bool) -> NewConfiguration:
        def run_once(_: int) -> dict[str, list[float]]:
            if compiled:
                raise RuntimeError("No working C++ compiler found\nand more")
            return {"total": [1.0]}

        return lambda steps, batch: Configuration("diffusers", "torch", "fp32", steps, batch, steps, run_once)

    monkeypatch.setattr(stock_diffusers, "open_stock", open_stock)
    reported: list[str] = []
    stock = StockModel("avatars", tmp_path)
    (eager,) = open_stock_variants(stock, device="cpu", with_compiled=True, steps=1, report=reported.append)
    assert eager(1, 1).run_once(0) == {"total": [1.0]}
    assert len(reported) == 1
    assert reported[0].endswith(": No working C++ compiler found")
    assert len(open_stock_variants(stock, device="cpu", with_compiled=False, steps=1, report=reported.append)) == 1
    assert len(reported) == 1


def test_base_of_another_pipeline_is_refused(tmp_path: Path) -> None:
    check_stock_base("avatars")
    with pytest.raises(ConfigError, match="is for a StableDiffusionXLPipeline"):
        check_stock_base(str(make_tiny_sdxl(tmp_path)))
