"""From a base model and LoRAs to a published bundle: plan, fuse, run, export, compile, verify, write."""

import gc
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import flashdiff
from flashdiff.components import Size
from flashdiff.engines.bundle import (
    PARTS,
    SCHEMA_VERSION,
    LatentCodec,
    Manifest,
    PartFile,
    PartSpec,
    graph_file,
    tokenizer_file,
    write_manifest,
)
from flashdiff.engines.cache import cached
from flashdiff.engines.compile import compile_export
from flashdiff.engines.config import BuildOptions, parse_batches, parse_sizes
from flashdiff.engines.export import export_onnx, export_openvino
from flashdiff.engines.parts import AtPrecision, Part, parts_of
from flashdiff.engines.plan import Export, Plan, plan_build
from flashdiff.engines.reference import Reference, run_reference
from flashdiff.engines.runtime.engine import Engine
from flashdiff.engines.verify import verify
from flashdiff.errors import BundleError
from flashdiff.families.base import TorchModel
from flashdiff.families.codec import shift_of
from flashdiff.files import hash_file, new_folder, write_whole
from flashdiff.lora import find_lora, load_fused

__all__ = ["BuildOptions", "build_engine", "parse_batches", "parse_sizes"]


def build_engine(options: BuildOptions, report: Callable[[str], None]) -> Manifest:
    """Build and publish the bundle `options.out`; `report` gets a line per stage. Refuses what `verify` refuses.

    A bundle that is up to date is left alone; one that is not is replaced when the new one is whole.
    """
    plan = plan_build(options)
    if not plan.changes:
        assert plan.previous
        report(f"{options.out} is up to date: the same base, LoRAs, options, code and libraries; nothing to do")
        return plan.previous
    for reason in plan.changes:
        report(f"building because {reason}")

    watch = _Stopwatch(report)
    with new_folder(options.out, BundleError, replace=True) as folder:
        manifest, expected = _from_torch(plan, folder, watch)
        gc.collect()  # modules hold each other in cycles: torch's weights go before the engine's come
        if options.backend != "torch":
            manifest = manifest.model_copy(update={"parts": _compile(plan, manifest, folder, watch)})
        engine = Engine(folder, manifest)
        findings = verify(expected, engine)
        watch.lap("verify", ", ".join(f"{name} {error:.1e}" for name, error in findings.errors.items()) + " off torch")
        costs = engine.measure_buckets()
        first = [cost for cost in costs if cost.batch == options.batch_sizes[0]]
        watch.lap("measure", ", ".join(f"{cost.part} {cost.ms:.1f} ms" for cost in first))
        files = {path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
        manifest = manifest.model_copy(
            update={
                "max_error": findings.errors,
                "max_error_allowed": findings.allowed,
                "rows_are_exact": findings.rows_are_exact,
                "step_costs": costs,
                "files": files,
            }
        ).sealed()
        write_manifest(folder, manifest)
    report(f"published {options.out} (bundle {manifest.bundle_hash[:12]})")
    return manifest


def _from_torch(plan: Plan, folder: Path, watch: "_Stopwatch") -> tuple[Manifest, Reference]:
    """All that torch is needed for: the exported parts in `folder`, a manifest of them, and what they will be compared with."""
    options = plan.options
    loras = [(find_lora(name), weight) for name, weight in options.loras]
    family, model = load_fused(options.base, loras, options.guidance)
    model.spec = plan.spec
    watch.lap("fuse", f"{options.base} ({family.name})" + "".join(f" + {lora.name}" for lora, _ in loras))
    parts = parts_of(family, model)
    expected = run_reference(model, parts, options.batch_sizes)
    watch.lap("run", "every part, and an image of each size, in torch")
    if options.backend == "torch":
        if options.precision != "fp32":
            for part in parts:
                AtPrecision(part, options.precision)  # casts its weights: the file need not hold what the engine will not use
        files = _save_torch(plan, model, folder)
        watch.lap("save", "the fused weights")
    else:
        # Backwards: below float32 an export casts its part, and the text encoder makes the denoiser's example.
        files = {part.name: _export(plan, model, part, folder, watch) for part in reversed(parts)}
    for tokenizer in model.spec.tokenizers:
        write_whole(folder / tokenizer_file(tokenizer), model.tokenizer.texts[tokenizer.name])
    return _manifest(plan, model, parts, files), expected


def _export(plan: Plan, model: TorchModel, part: Part, folder: Path, watch: "_Stopwatch") -> tuple[PartFile, ...]:
    """Export one part into its folder of the bundle, or take it from the cache."""
    files = []
    write, form = (export_openvino, "OpenVINO") if plan.inputs.backend == "openvino" else (export_onnx, "ONNX")
    for export in (export for export in plan.exports if export.part == part.name):

        def make(target: Path, size: Size = export.size or plan.inputs.sizes[0]) -> None:
            write(model, part, target, size=size, precision=plan.inputs.precision)

        was_cached = cached(export.key, make, folder / _place(export))
        files.append(PartFile(file=(_place(export) / graph_file(plan.inputs.backend)).as_posix(), size=export.size))
        watch.lap("export", f"{part.name} to {form}{_at(export)}" + (", from the cache" if was_cached else ""))
    return tuple(files)


def _compile(plan: Plan, manifest: Manifest, folder: Path, watch: "_Stopwatch") -> dict[str, PartSpec]:
    """The exported parts as the backend's own files."""
    parts = {}
    for name, part in manifest.parts.items():
        files: list[PartFile] = []
        for export in (export for export in plan.exports if export.part == name):
            place = _place(export)
            compiled = compile_export(part, export, plan.inputs, folder / place, watch.note)
            files += [file.model_copy(update={"file": (place / file.file).as_posix()}) for file in compiled]
            watch.lap("compile", f"{name} for {plan.inputs.backend}{_at(export)}")
        parts[name] = part.model_copy(update={"files": tuple(files)})
    return parts


def _place(export: Export) -> Path:
    return Path(export.part, str(export.size) if export.size else "")


def _at(export: Export) -> str:
    return f" at {export.size}" if export.size else ""


def _save_torch(plan: Plan, model: TorchModel, folder: Path) -> dict[str, tuple[PartFile, ...]]:
    """A base directory again, with the LoRAs in its weights: what the torch backend reads."""
    from flashdiff.engines.runtime.torch_backend import MODEL

    target = folder / MODEL
    for name, module in model.weights.items():
        module.save_pretrained(target / name, safe_serialization=True)
    for file in (*plan.folder.glob("*.json"), *plan.folder.glob("*/*")):  # configurations and vocabularies are the base's own
        if file.suffix in (".json", ".txt", ".model") and not file.name.endswith(".index.json"):
            (target / file.relative_to(plan.folder).parent).mkdir(exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(plan.folder))
    return {part: (PartFile(file=f"{MODEL}/model_index.json"),) for part in PARTS}


def _manifest(plan: Plan, model: TorchModel, parts: list[Part], files: dict[str, tuple[PartFile, ...]]) -> Manifest:
    """All but what compiling, verifying and measuring will add."""
    vae = model.weights["vae"]
    return Manifest(
        **dict(plan.inputs),
        schema_version=SCHEMA_VERSION,
        flashdiff_version=flashdiff.__version__,
        latent_codec=LatentCodec(
            channels=model.spec.latent_channels,
            factor=model.spec.latent_factor,
            scale=vae.config.scaling_factor,
            shift=shift_of(vae),
        ),
        parts={part.name: PartSpec(files=files[part.name], inputs=part.inputs, outputs=part.outputs) for part in parts},
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
