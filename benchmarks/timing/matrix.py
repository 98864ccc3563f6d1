"""The matrix: every backend and precision of this machine in one table of speed and quality, with stock diffusers to compare."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import read_environment
from benchmarks.markdown_table import markdown_table
from benchmarks.measurements import Measurement
from benchmarks.timing.bundle_pairs import BACKENDS
from benchmarks.timing.configurations import Configuration, in_process, stage_measurements, time_configurations
from benchmarks.timing.stock_diffusers import StockModel, open_stock_variants
from flashdiff.engines.bundle import Manifest, Precision
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.errors import BackendError, BundleError

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8", "fp8")
_STEPS = 4
_COMPILED = "torch, compiled"


def build_matrix(
    base: str,
    lora: Path,
    batches: Sequence[int],
    prompts: Path | None,
    folder: Path,
    *,
    with_compiled: bool,
    report: Callable[[str], None],
) -> list[Path]:
    """A student's bundle in `folder` for every backend and precision that runs here; `report` gets a line for each that does not.

    The prompts calibrate int8 and measure quality; the embedded model needs none. `with_compiled` adds torch with its parts
    compiled.
    """
    from flashdiff.engines.build import BuildOptions, build_engine

    engines = [(backend, precision, False) for backend in BACKENDS for precision in PRECISIONS]
    if with_compiled:
        engines += [("torch", precision, True) for precision in PRECISIONS if precision != "int8"]
    bundles = []
    for backend, precision, is_compiled in engines:
        name = f"{_COMPILED if is_compiled else backend} {precision}"
        out = folder / name
        options = BuildOptions(
            base=base, loras=((str(lora), 1.0),), backend=backend, batch_sizes=tuple(sorted({*batches})), out=out
        ).model_copy(update={"precision": precision, "compile": is_compiled, "calibration_prompts": prompts})
        try:
            build_engine(options, report, with_quality=True)
        except (BackendError, BundleError) as error:
            if isinstance(error, BundleError) and precision == "fp32":
                raise
            report(f"without {name}: {error}")
        else:
            bundles.append(out)
    if not bundles:
        raise BackendError("no backend runs here")
    return bundles


def run_matrix(
    bundles: Sequence[Path],
    *,
    batches: Sequence[int],
    repeats: int,
    with_compiled: bool,
    report: Callable[[str], None],
    stock: StockModel | None = None,
) -> dict[str, Any]:
    """Time every bundle, and stock diffusers where it is given, in turns.

    {"environment": ..., "rows": [...], "quality": [...]}
    """
    engines = [open_bundle(bundle) for bundle in bundles]
    kinds = [_kind(engine.manifest) for engine in engines]
    if len(set(kinds)) < len(kinds):
        raise BundleError("two bundles have the same backend and precision, so their measurements would have the same name")
    for engine in engines:
        if max(batches) * engine.spec.sampler.evaluations_per_step > engine.max_batch:
            raise BundleError(f"--batch {max(batches)}: a bundle takes at most {engine.max_batch} evaluations at once")
    steps = min(_STEPS, *(engine.spec.sampler.max_steps for engine in engines))
    variants = []
    if stock:
        device = engines[0].manifest.machine.device
        variants = open_stock_variants(stock, device=device, with_compiled=with_compiled, steps=steps, report=report)
    configurations = list[Configuration]()
    for batch in batches:
        configurations += [
            in_process("student", engine, steps, batch, *kind) for engine, kind in zip(engines, kinds, strict=True)
        ]
        configurations += [new_configuration(steps, batch) for new_configuration in variants]
    environment = read_environment({" ".join(kind): engine.manifest for kind, engine in zip(kinds, engines, strict=True)})
    samples = time_configurations(configurations, repeats, report)
    return {
        "environment": environment,
        "rows": stage_measurements(configurations, samples),
        "quality": [_quality(engine.manifest) for engine in engines],
    }


def _kind(manifest: Manifest) -> tuple[str, str]:
    """The names of backend and precision."""
    return _COMPILED if manifest.compiled else manifest.backend, manifest.precision


def _quality(manifest: Manifest) -> Measurement:
    backend, precision = _kind(manifest)
    quality = manifest.quality.model_dump(mode="json") if manifest.quality else {}
    return {"backend": backend, "precision": precision, **quality}


def matrix_table(results: Mapping[str, Any]) -> str:
    """A line per model, backend, precision and batch: time, ratio to stock diffusers, and quality."""
    rows: list[Measurement] = results["rows"]
    quality = {(one["backend"], one["precision"]): one for one in results["quality"]}
    totals = [one for one in rows if one["stage"] == "total"]
    stocks = [*dict.fromkeys(one["model"] for one in totals if one["model"] != "student")]
    titles = ["model", "backend", "precision", "batch", "a step of the batch, ms", f"an image of {totals[0]['steps']} steps, ms"]
    titles += [*(f"{name} takes" for name in stocks), "PSNR to float32, dB", "large attributes", "KID x1000"]
    lines = []
    for total in totals:
        same = [one for one in rows if _about(one) == _about(total)]
        step = next((f"{one['median_ms']:.2f}" for one in same if one["stage"] == "denoise_step"), "")
        ratios = [
            f"{other['median_ms'] / total['median_ms']:.2f}x"
            for name in stocks
            for other in totals
            if other["model"] == name and other["batch"] == total["batch"]
        ]
        found = quality.get((total["backend"], total["precision"]), {}) if total["model"] == "student" else {}
        lines.append(
            [
                *(total[name] for name in ("model", "backend", "precision", "batch")),
                step,
                f"{total['median_ms'] / total['batch']:.2f}",
                *ratios,
                f"{found['psnr']:.1f}" if found.get("psnr") is not None else "",
                "{1:.1%} (float32 {0:.1%})".format(*found["attributes"]) if found.get("attributes") else "",
                "{1:.2f} (float32 {0:.2f})".format(*found["kid"]) if found.get("kid") else "",
            ]
        )
    return markdown_table(titles, lines)


def _about(measurement: Measurement) -> tuple[Any, ...]:
    return tuple(measurement[name] for name in ("model", "backend", "precision", "batch", "steps"))
