"""The second gate: the stock pipeline's image is that of a build, and a setting that flashdiff takes wrongly stops the build."""

from pathlib import Path
from typing import Any

import pytest
from tiny import MODELS, STUDENTS

from flashdiff import cli
from flashdiff.components import ModelSpec
from flashdiff.engines.build import build_engine
from flashdiff.engines.bundle import StockComparison, read_manifest
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.parts import parts_of
from flashdiff.engines.plan import plan_build
from flashdiff.engines.stock import StockReference, run_stock
from flashdiff.errors import BundleError
from flashdiff.families import codec, family_of, load_base
from flashdiff.samplers.options import SamplingOptions, sampled_as
from flashdiff.sampling import Sampler, flash_student
from flashdiff.schedule import FlowSchedule, Grid

pytestmark = pytest.mark.slow

NOISE_SAMPLERS = ("lcm", "euler", "euler-ancestral", "ddim", "tcd")


def _samplers(spec: ModelSpec) -> list[ModelSpec]:
    """The base's own, a flash student's, and every published one."""
    student = flash_student(spec.sampler, Grid(solver_steps=32, modes=4))
    flows = [{"spacing": "trailing"}, {"spacing": "linspace"}, {"eta": 1.0}, {"timesteps": (999, 500)}]
    if isinstance(spec.sampler.schedule, FlowSchedule):
        given = [SamplingOptions.model_validate({"sampler": "flow-euler", **flow}) for flow in [*flows, {"shift": 2.0}]]
    else:
        given = [SamplingOptions(sampler=name) for name in NOISE_SAMPLERS]
    return [spec, spec.model_copy(update={"sampler": student}), *(sampled_as(spec, options) for options in given)]


@pytest.mark.parametrize("name", MODELS)
def test_torchs_image_is_the_stock_pipelines_with_every_sampler(name: str, tmp_path: Path) -> None:
    base = MODELS[name](tmp_path / name)
    family, model = load_base(str(base))
    for spec in _samplers(model.spec):
        model.spec = spec
        found = run_stock(family, model, base, parts_of(family, model))
        assert isinstance(found, StockReference)
        assert found.torch_error < 1e-5, model.spec.sampler
        assert found.pixels.std() > 0.1


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_published_consistency_student_is_compared_with_its_own_pipeline(tmp_path: Path, guidance: float | None) -> None:
    base = STUDENTS["sana-sprint"](tmp_path / "sprint")
    family = family_of(base)
    model = family.load(base, sampled_as(family.read_spec(base), SamplingOptions(guidance=guidance)))
    found = run_stock(family, model, base, parts_of(family, model))
    assert isinstance(found, StockReference)
    assert found.torch_error < 1e-5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen-image", SamplingOptions(preset="qwen-image-lightning-4")),
        ("sd3", SamplingOptions(sampler="ode", shift=2.0)),
        ("flux", SamplingOptions(sampler="ode", shift=2.0)),
    ],
)
def test_a_shift_of_its_own_passes(tmp_path: Path, name: str, options: SamplingOptions) -> None:
    base = MODELS[name](tmp_path / name)
    family = family_of(base)
    model = family.load(base, sampled_as(family.read_spec(base), options))  # networks hold the levels of whole times
    found = run_stock(family, model, base, parts_of(family, model))
    assert isinstance(found, StockReference)
    assert found.torch_error < 1e-5


def _build(base: Path, out: Path, **changes: Any) -> list[str]:
    said: list[str] = []
    options = {"base": str(base), "out": out, "backend": "torch", "batch_sizes": (1, 2), **changes}
    build_engine(BuildOptions.model_validate(options), said.append)
    return said


def test_a_build_says_what_it_compared_and_keeps_it(
    tiny_base: Path, flash_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    said = _build(tiny_base, out, loras=((str(flash_lora), 1.0),))
    stock = read_manifest(out).stock
    assert isinstance(stock, StockComparison)
    assert (stock.made_by, stock.steps, str(stock.size)) == ("StableDiffusionPipeline with LCMScheduler", 2, "32x32")
    assert stock.torch_error < 1e-5 < stock.allowed
    assert stock.error < stock.allowed
    assert any("2 steps at 32x32 of StableDiffusionPipeline with LCMScheduler" in line for line in said)
    assert cli.main(["inspect", str(out)]) == 0
    assert f"off stock    image        {stock.error:.1e} (allowed {stock.allowed:.1e}" in capsys.readouterr().out


def _wrong_scaling(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(codec.Decoder, "forward", lambda self, latents: self.vae.decode(latents / 0.45, return_dict=False)[0])


def _wrong_guidance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sampler, "evaluations_per_step", property(lambda _: 1))


def _wrong_times(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sampler, "times", lambda _, steps, tokens=None: [999, 749][:steps])


def _wrong_shift(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FlowSchedule, "shift_at", lambda schedule, *_: schedule.shift)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("sdxl", _wrong_scaling), ("sd15", _wrong_guidance), ("pixart", _wrong_times), ("flux", _wrong_shift)],
)
def test_a_setting_that_our_own_model_has_wrong_stops_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any
) -> None:
    base, out = MODELS[name](tmp_path / name), tmp_path / "bundle"
    wrong(monkeypatch)
    size = ((64, 48),) if name == "flux" else ()  # the shift is right at the default size
    with pytest.raises(BundleError, match=r"differs from that of the stock \w+ with \w+ by .*--no-compare-stock") as error:
        _build(base, out, precision="fp32", sizes=size)
    assert "\n" not in str(error.value)
    assert not out.exists()
    said = _build(base, out, precision="fp32", sizes=size, compare_stock=False)  # the first gate does not see it
    assert any(line.endswith("not compared: --no-compare-stock") for line in said)


def test_a_build_that_was_not_compared_is_made_again_to_be_compared(tiny_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    _build(tiny_base, out, compare_stock=False)
    assert _build(tiny_base, out, compare_stock=False)[0].endswith("nothing to do")
    before = read_manifest(out)
    assert _build(tiny_base, out)[0] == "building because it was not compared with the stock pipeline"
    after = read_manifest(out)
    assert isinstance(after.stock, StockComparison)
    assert after.bundle_hash == before.bundle_hash
    assert not plan_build(BuildOptions(base=str(tiny_base), out=out, backend="torch", batch_sizes=(1, 2))).changes


def test_where_diffusers_has_no_such_sampling_the_bundle_says_so(tiny_base: Path, tmp_path: Path) -> None:
    _build(tiny_base, tmp_path / "bundle", sampler="ddim", timesteps=(800, 400))
    assert read_manifest(tmp_path / "bundle").stock == "diffusers' DDIMScheduler takes no times of a student's own"


def test_a_pipeline_that_cannot_be_made_stops_the_build_in_one_line(tiny_base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import diffusers

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", fail)
    with pytest.raises(BundleError, match=r"the stock StableDiffusionPipeline makes no image: .*no such thing.*--no-compare"):
        _build(tiny_base, tmp_path / "bundle")
