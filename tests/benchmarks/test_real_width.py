"""Denoisers at real width: the bases that are written for all of them, and the code path on a tiny model."""

from pathlib import Path

import pytest
from tiny import FAMILIES

from benchmarks import real_width
from benchmarks.real_size.base import write_base
from benchmarks.real_size.networks import NETWORKS
from flashdiff.errors import BundleError
from flashdiff.families import family_of


@pytest.mark.parametrize("name", NETWORKS)
def test_the_base_of_every_network_is_one_of_its_family(name: str, tmp_path: Path) -> None:
    write_base(name, tmp_path / name, is_whole=False, is_cut=True, weights=False)
    family = family_of(tmp_path / name)
    assert family.name.replace("-", "_") == NETWORKS[name].family
    spec = family.read_spec(tmp_path / name)
    assert spec.latent_factor == (32 if "sana" in name else 8)


@pytest.mark.slow
def test_a_tiny_denoiser_is_exported_and_compared(tmp_path: Path) -> None:
    base = FAMILIES["sana"](tmp_path / "sana")
    (tmp_path / "graph").mkdir()
    found = real_width.compare_denoiser(base, tmp_path / "graph")
    assert (tmp_path / "graph" / "model.onnx").is_file()
    assert 0 < found["max_error"] <= 1e-4
    assert found["peak_gib"] > 0.1


def test_a_graph_that_is_off_is_refused() -> None:
    real_width.check_error("sana", 1e-4)
    for error, said in ((2e-4, "2.00e-04"), (float("nan"), "nan")):
        with pytest.raises(BundleError, match=f"sana: the denoiser differs from torch by {said}, more than 1e-04"):
            real_width.check_error("sana", error)


def test_the_table_has_a_line_a_model() -> None:
    row = {
        "model": "sana-1600m, random weights", "layers": "2 of 20", "parameters": 202_000_000, "parameters_of_all": 1_604_462_752,
        "peak_gib": 2.34, "cpu_s": 51, "max_error": 1.234e-5,
    }  # fmt: skip
    line = real_width.width_table([row]).splitlines()[-1]
    assert line == "| `sana-1600m` | 2 of 20 | 202 M of 1,604 M | 2.3 GiB | 51 s | 1.2e-05 |"


def test_an_unknown_model_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        real_width.main(["sana", "--json", "x.json"])
    assert "sana: no such model; there are sd15, sd2, sdxl" in capsys.readouterr().err
