"""From a base model and LoRAs to a published bundle: plan, fuse, run, export, compile, verify, write."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flashdiff
from flashdiff.components import Size
from flashdiff.engines.backends.base import Export, GraphForm
from flashdiff.engines.bundle import (
    NOT_COMPARED,
    SCHEMA_VERSION,
    SLOTS,
    LatentCodec,
    Manifest,
    PartFile,
    PartRecord,
    tokenizer_file,
    write_manifest,
)
from flashdiff.engines.cache import cached
from flashdiff.engines.calibration import Samples, check_tokens, sample
from flashdiff.engines.choose import BUILDING, PUBLISHED, choose_precision
from flashdiff.engines.config import BuildOptions, parse_batches, parse_sizes
from flashdiff.engines.describe import describe_errors, describe_quality, describe_quantization, describe_stock
from flashdiff.engines.parts import Part, parts_of
from flashdiff.engines.plan import BuildPlan, plan_build
from flashdiff.engines.quality import decoder_psnr, measure_quality
from flashdiff.engines.quantize import quantize_denoiser
from flashdiff.engines.reference import Reference, on_gpu, run_reference
from flashdiff.engines.runtime.engine import Engine
from flashdiff.engines.stock import StockReference, compare_stock, run_stock
from flashdiff.engines.verify import Findings, verify
from flashdiff.errors import BundleError
from flashdiff.families.autoencoders import with_vae
from flashdiff.families.base import TorchModel
from flashdiff.families.codec import shift_of
from flashdiff.families.control import with_controls
from flashdiff.families.ip_adapter import with_adapter
from flashdiff.families.slots import table_of, with_slots
from flashdiff.files import counted, hash_file, new_folder, write_whole
from flashdiff.lora import fuse
from flashdiff.lora_requests import slots_of

__all__ = ["BuildOptions", "build_engine", "parse_batches", "parse_sizes"]


def build_engine(options: BuildOptions, report: Callable[[str], None], *, with_quality: bool = False) -> Manifest:
    """Build and publish the bundle `options.out`; `report` gets a line per stage. Refuses what `verify` refuses.

    `with_quality` measures the quality of any precision, not of int8 and fp8 alone.

    A bundle that is up to date is left alone; one that is not is replaced when the new one is whole.
    """
    if options.precision == "auto":
        return choose_precision(options, _build, report)
    return _build(plan_build(options, with_quality=with_quality), report)


def _build(plan: BuildPlan, report: Callable[[str], None]) -> Manifest:
    """Build and publish what is planned."""
    options = plan.options
    for warning in plan.warnings:
        report(f"warning: {warning}")
    if not plan.changes:
        assert plan.previous
        report(f"{options.out} is up to date: the same base, LoRAs, options, code and libraries; nothing to do")
        return plan.previous
    for reason in plan.changes:
        report(f"{BUILDING} {reason}")
    report(f"backend: {plan.machine}")

    watch = _Stopwatch(report)
    with new_folder(options.out, BundleError, replace=True) as folder:
        manifest, torch = _from_torch(plan, folder, watch)
        gc.collect()  # modules hold each other in cycles: torch's weights go before the engine's come
        findings: Findings | None = None
        if manifest.precision in plan.backend.quantize:
            assert torch.samples
            manifest, findings = quantize_denoiser(manifest, folder, torch.samples, torch.reference, report)
            watch.lap("quantize", f"{describe_quantization(manifest)}; {describe_errors(manifest.model, findings.errors)}")
        if plan.backend.compile_graph:
            manifest = manifest.model_copy(update={"parts": _compile(plan, manifest, folder, watch)})
        engine = Engine(folder, manifest)
        if findings is None or plan.backend.compile_graph:
            findings = verify(torch.reference, engine)
        watch.lap("verify", describe_errors(engine.spec, findings.errors))
        compared = torch.stock if isinstance(torch.stock, str) else compare_stock(torch.stock, engine)
        watch.lap("compare", describe_stock(compared))
        quality = measure_quality(engine, torch.samples) if torch.samples else None
        if quality:
            watch.lap("compare", describe_quality(quality))
        costs = engine.measure_buckets()
        first = [cost for cost in costs if cost.batch == options.batch_sizes[0]]
        watch.lap("measure", ", ".join(f"{cost.part} {cost.ms:.1f} ms" for cost in first))
        files = {path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        manifest = manifest.model_copy(
            update={
                "max_error": findings.errors,
                "max_error_allowed": findings.allowed,
                "rows_are_exact": findings.rows_are_exact,
                "quality": quality,
                "stock": compared,
                "step_costs": costs,
                "files": files,
            }
        ).sealed()
        write_manifest(folder, manifest)
    report(f"{PUBLISHED} {options.out} (bundle {manifest.bundle_hash[:12]})")
    return manifest


@dataclass(frozen=True, kw_only=True)
class _Torch:
    """What an engine is compared with, and calibrated on."""

    reference: Reference
    stock: StockReference | str
    """A text in place of the stock pipeline's image says why there is none."""
    samples: Samples | None
    """None where the build neither quantizes nor measures quality."""


def _from_torch(plan: BuildPlan, folder: Path, watch: "_Stopwatch") -> tuple[Manifest, _Torch]:
    """All that torch is needed for: the exported parts in `folder`, a manifest of them, and what they will be compared with."""
    options = plan.options
    model = plan.family.load(plan.folder, plan.spec)
    check_tokens(model, plan.prompts)
    own_decoder = model.decoder
    if plan.vae:
        model = with_vae(model, plan.vae)
    model = with_controls(plan.family, with_adapter(plan.family, model, plan.adapter), plan.controls)
    model = with_slots(model, plan.family, plan.inputs.lora_slots, plan.inputs.lora_rank)
    if slots_of(model.spec) != slots_of(plan.spec):
        raise BundleError(f"{plan.folder}: its network has other layers than the headers of its weights say")
    fuse(model, plan.family, plan.loras)
    watch.lap(
        "fuse",
        f"{options.base} ({plan.family.name})"
        + "".join(f" + {name}" for name in (*(lora.name for lora, _ in plan.loras), *plan.controls))
        + (f" + {plan.adapter.file.name}" if plan.adapter else ""),
    )
    plan.check_sources()
    parts = parts_of(plan.family, model)
    expected = run_reference(model, parts, options.batch_sizes)
    watch.lap("run", "every part, and an image of each size, in torch")
    vae_psnr = None
    if plan.vae:
        vae_psnr = decoder_psnr(model, parts, own_decoder)
        watch.lap("run", f"an image of each size by both decoders: {vae_psnr:.1f} dB apart")
    samples = None
    if plan.prompts:
        with on_gpu(parts):
            samples = sample(model, plan.prompts)
        watch.lap("run", f"{counted(len(samples.images), 'image')} of the calibration prompts in torch")
    stock: StockReference | str = NOT_COMPARED
    if options.compare_stock:
        stock = run_stock(plan.family, model, plan.folder, parts, plan.vae)
        watch.lap("run", stock if isinstance(stock, str) else f"an image at {stock.size} by the stock {stock.made_by}")
    if form := plan.backend.graph:
        # Backwards: below float32 an export casts its part, and the text encoder makes the denoiser's example.
        files = {part.name: _export(plan, form, model, part, folder, watch) for part in reversed(parts)}
    else:
        assert plan.backend.save
        files = plan.backend.save(model, parts, folder, plan.inputs, watch.note)
        watch.lap("save", "the compiled parts" if plan.inputs.compiled else "the fused weights")
    for tokenizer in model.spec.tokenizers:
        write_whole(folder / tokenizer_file(tokenizer), model.tokenizer.texts[tokenizer.name])
    if plan.inputs.lora_slots:
        write_whole(folder / SLOTS, table_of(model, plan.family, plan.inputs.lora_rank).model_dump_json() + "\n")
    plan.check_sources()
    manifest = _manifest(plan, model, parts, files).model_copy(update={"vae_psnr": vae_psnr})
    return manifest, _Torch(reference=expected, stock=stock, samples=samples)


def _export(
    plan: BuildPlan, form: GraphForm, model: TorchModel, part: Part, folder: Path, watch: "_Stopwatch"
) -> tuple[PartFile, ...]:
    """Export one part into its folder of the bundle, or take it from the cache."""
    files = []
    for export in (export for export in plan.exports if export.part == part.name):

        def make(target: Path, size: Size = export.size or plan.inputs.sizes[0]) -> None:
            form.export(model, part, target, size=size, precision=plan.backend.graph_precision(plan.inputs.precision))
            plan.check_sources()  # weights may be mapped from the base's files: the cache must not name others

        was_cached = cached(export.key, make, folder / _place(export))
        files.append(PartFile(file=(_place(export) / form.file).as_posix(), size=export.size))
        watch.lap("export", f"{part.name} to {form.name}{_at(export)}" + (", from the cache" if was_cached else ""))
    return tuple(files)


def _compile(plan: BuildPlan, manifest: Manifest, folder: Path, watch: "_Stopwatch") -> dict[str, PartRecord]:
    """The exported parts as the files of a backend that does not read the graph itself."""
    assert plan.backend.compile_graph
    parts = {}
    for name, part in manifest.parts.items():
        files: list[PartFile] = []
        for export in (export for export in plan.exports if export.part == name):
            place = _place(export)
            compiled = plan.backend.compile_graph(part, export, plan.inputs, folder / place, watch.note)
            files += [file.model_copy(update={"file": (place / file.file).as_posix()}) for file in compiled]
            watch.lap("compile", f"{name} for {plan.backend.name}{_at(export)}")
        parts[name] = part.model_copy(update={"files": tuple(files)})
    return parts


def _place(export: Export) -> Path:
    return Path(export.part, str(export.size) if export.size else "")


def _at(export: Export) -> str:
    return f" at {export.size}" if export.size else ""


def _manifest(plan: BuildPlan, model: TorchModel, parts: list[Part], files: dict[str, tuple[PartFile, ...]]) -> Manifest:
    """All but what compiling, verifying and measuring will add."""
    vae = model.weights["vae"]
    return Manifest(
        **dict(plan.inputs),
        schema_version=SCHEMA_VERSION,
        flashdiff_version=flashdiff.__version__,
        latent_codec=LatentCodec(
            channels=model.spec.latent_channels,
            factor=model.spec.latent_factor,
            scale=getattr(vae.config, "scaling_factor", None),
            shift=shift_of(vae),
        ),
        parts={part.name: PartRecord(files=files[part.name], inputs=part.inputs, outputs=part.outputs) for part in parts},
        rows_are_exact=False,
        max_error={},
        max_error_allowed={},
        step_costs=(),
        files={},
    )


class _Stopwatch:
    """Says what each stage took."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.note, self._last = report, time.monotonic()

    def lap(self, stage: str, what: str) -> None:
        now = time.monotonic()
        self.note(f"{stage:8} {now - self._last:5.1f} s  {what}")
        self._last = now
