"""From a base model and LoRAs to a published bundle: fuse, export, compile, verify, write."""

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flashdiff
from flashdiff.components import ModelSpec, Size
from flashdiff.engines.bundle import MANIFEST, SCHEMA_VERSION, BackendName, LoraRecord, Manifest, PartSpec, tokenizer_file
from flashdiff.errors import BundleError
from flashdiff.files import hash_file, new_folder, write_whole

_LIBRARIES = ("torch", "diffusers", "onnx", "onnxscript", "openvino", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    base: str
    out: Path
    loras: tuple[tuple[str, float], ...] = ()
    """Folder or shipped name, and weight."""
    backend: BackendName = "openvino"
    sizes: tuple[Size, ...] = ()
    """Empty: the size the base was trained at."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    guidance: float | None = None
    """Of a base without a flash LoRA; None: the family's default."""


def build_engine(options: BuildOptions, report: Callable[[str], None]) -> Manifest:
    """Build and publish the bundle `options.out`; `report` gets a line per stage. Refuses what `verify` refuses."""
    if options.out.exists():  # said before the minutes of work, and again by new_folder after them
        raise BundleError(f"{options.out} exists already; choose another --out or remove it")
    from flashdiff.engines.export import export_onnx, parts_of
    from flashdiff.engines.runtime.engine import Engine
    from flashdiff.engines.verify import MAX_ERROR, verify
    from flashdiff.lora import find_lora, load_fused, lora_hash

    watch = _Stopwatch(report)
    folders = [(find_lora(name), weight) for name, weight in options.loras]
    family, model = load_fused(options.base, folders, options.guidance)
    model.spec = bundle_spec(model.spec, options)
    loras = tuple(LoraRecord(name=folder.name, weights_hash=lora_hash(folder), weight=weight) for folder, weight in folders)
    watch.lap("fuse", f"{options.base} ({family.name})" + "".join(f" + {lora.name}" for lora in loras))

    parts = parts_of(model)
    with new_folder(options.out, BundleError) as folder:
        compiled: dict[str, PartSpec] = {}
        for part in parts:
            spec = export_onnx(model, part, folder / part.name)
            compiled[part.name] = _for_backend(options.backend, folder / part.name, part.name, spec)
            watch.lap("export", f"{part.name} to ONNX" + (", converted to OpenVINO" if options.backend == "openvino" else ""))
        for tokenizer in model.spec.tokenizers:
            write_whole(folder / tokenizer_file(tokenizer), model.tokenizer.texts[tokenizer.name])

        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            flashdiff_version=flashdiff.__version__,
            model=model.spec,
            base_hash=model.base_hash,
            loras=loras,
            backend=options.backend,
            precision="fp32",
            batch_sizes=options.batch_sizes,
            parts=compiled,
            max_error={},
            max_error_allowed=MAX_ERROR,
            step_cost_ms={},
            library_versions={name: importlib.metadata.version(name) for name in _LIBRARIES if _is_installed(name)},
            files={path.relative_to(folder).as_posix(): hash_file(path) for path in sorted(folder.rglob("*")) if path.is_file()},
        )
        engine = Engine(folder, manifest)
        sizes = ", ".join(map(str, model.spec.sizes))
        watch.lap("compile", f"{options.backend}, batch {', '.join(map(str, options.batch_sizes))} at {sizes}")
        errors = verify(model, parts, engine)
        watch.lap(
            "verify", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()) + f" off torch (allowed {MAX_ERROR:.0e})"
        )
        costs = engine.measure_costs()
        watch.lap("measure", ", ".join(f"{part} {cost[options.batch_sizes[0]]:.1f} ms" for part, cost in costs.items()))
        manifest = manifest.model_copy(update={"max_error": errors, "step_cost_ms": costs})
        write_whole(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    report(f"published {options.out} (bundle {manifest.bundle_hash[:12]})")
    return manifest


def bundle_spec(model: ModelSpec, options: BuildOptions) -> ModelSpec:
    """The spec with the bundle's sizes; BundleError when sizes or batch sizes do not fit the model."""
    for size in options.sizes:
        if size.width % (2 * model.latent_factor) or size.height % (2 * model.latent_factor) or min(size) <= 0:
            raise BundleError(f"--size {size}: width and height must be multiples of {2 * model.latent_factor}")
    if options.batch_sizes[-1] < model.sampler.evaluations_per_step:
        raise BundleError(f"--batch must reach {model.sampler.evaluations_per_step}: guidance evaluates the network twice a step")
    return model.model_copy(update={"sizes": options.sizes or model.sizes})


def _for_backend(backend: BackendName, folder: Path, part: str, exported: PartSpec) -> PartSpec:
    """The part as its backend reads it; for OpenVINO the ONNX files are replaced by its own."""
    if backend == "onnxruntime":
        return exported.model_copy(update={"file": f"{part}/{exported.file}"})
    from flashdiff.engines.runtime.openvino_backend import convert

    convert(folder / exported.file, folder / "model.xml")
    for path in folder.glob("model.onnx*"):
        path.unlink()
    return exported.model_copy(update={"file": f"{part}/model.xml"})


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


class _Stopwatch:
    """Says what each stage took."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report, self._last = report, time.monotonic()

    def lap(self, stage: str, what: str) -> None:
        now = time.monotonic()
        self._report(f"{stage:8} {now - self._last:5.1f} s  {what}")
        self._last = now


def parse_sizes(text: str) -> tuple[Size, ...]:
    """`512x512,768x768` as sizes; BundleError for anything else."""
    try:
        return tuple(Size(*(int(side) for side in item.split("x", 1))) for item in text.split(","))
    except (ValueError, TypeError):
        raise BundleError(f"--size '{text}': give WIDTHxHEIGHT, several with commas") from None


def parse_batches(text: str) -> tuple[int, ...]:
    """`1,2,4,8` as rising batch sizes; BundleError for anything else."""
    try:
        sizes = sorted({int(item) for item in text.split(",")})
    except ValueError:
        sizes = [0]
    if sizes[0] < 1 or sizes[-1] > 64:
        raise BundleError(f"--batch '{text}': give numbers from 1 to 64 with commas")
    return tuple(sizes)
