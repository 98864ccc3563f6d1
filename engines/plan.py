"""What a build would make, and why, from configuration files and hashes alone: no weights are loaded."""

import importlib.metadata
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors

import flashdiff
from flashdiff.components import ModelSpec
from flashdiff.engines.backends import find_backend
from flashdiff.engines.backends.base import EXPORTERS, Backend, Export, GraphForm
from flashdiff.engines.bundle import MANIFEST, BuildInputs, LoraRecord, Manifest, read_manifest
from flashdiff.engines.cache import is_cached, key_of
from flashdiff.engines.config import BuildOptions
from flashdiff.errors import BundleError
from flashdiff.families import family_of, find_base
from flashdiff.families.base import ModelFamily, base_hash
from flashdiff.families.loading import read_config
from flashdiff.files import cache_folder, hash_files
from flashdiff.lora import check_base, find_lora, fused_spec, lora_hash
from flashdiff.parts import Phase


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    options: BuildOptions
    backend: Backend
    family: ModelFamily
    folder: Path
    spec: ModelSpec
    inputs: BuildInputs
    exports: tuple[Export, ...]
    parameters: dict[str, int]
    """Of each part."""
    previous: Manifest | None
    """The bundle at `out` now."""
    flaw: str | None
    """Why there is none, though something is there."""

    @property
    def changes(self) -> list[str]:
        """Why `out` has to be built, in plain words; empty when it is up to date."""
        if self.previous is None:
            return [self.flaw or f"there is no bundle at {self.options.out} yet"]
        if self.previous.fingerprint == self.inputs.fingerprint:
            return []
        return list(_differences(self.previous, self.inputs))

    @property
    def buckets(self) -> int:
        """Compiled shapes of a part that has image sizes."""
        return len(self.inputs.sizes) * len(self.inputs.batch_sizes)

    @property
    def disk_bytes(self) -> dict[Path, int]:
        """What the build may write, at most, where."""
        width = self.backend.weight_bytes[self.inputs.precision]
        weights = {part: count * width for part, count in self.parameters.items()}
        copies = self.buckets if self.backend.files_per_bucket else 1
        sizes = {part: len([e for e in self.exports if e.part == part]) for part in weights}
        bundle = sum(weights[part] * max(copies, sizes[part]) for part in weights)
        cache = sum(weights[export.part] for export in self.exports if not export.is_cached)
        return {self.options.out.absolute().parent: bundle, cache_folder(): cache}

    @property
    def memory_bytes(self) -> int:
        """Peak, roughly: the model in torch, and when that is gone once a bucket; activations and libraries on top."""
        copies = self.buckets if self.backend.memory_per_bucket else 1
        return 4 * copies * sum(self.parameters.values()) + (1400 << 20)


def plan_build(options: BuildOptions) -> BuildPlan:
    """Check the options against the base, the LoRAs, this machine and the disk, and say what has to be done.

    BundleError, LoraError, ModelError or BackendError name what does not fit.
    """
    previous, flaw = _previous(options.out)
    backend = find_backend(options.backend)
    machine = backend.machine()
    backend.check_build(options.precision, machine)
    backend.import_modules()  # so that a missing library is reported now, not after minutes of exporting
    folder = find_base(options.base)
    family = family_of(folder)
    found = [(find_lora(name), weight) for name, weight in options.loras]
    spec = fused_spec(family.read_spec(folder), [lora for lora, _ in found], options.guidance)
    hash_of_base = base_hash(folder)
    check_base(folder, hash_of_base, [lora for lora, _ in found])
    spec = spec.model_copy(update={"sizes": options.sizes or spec.sizes})
    _check_shapes(options, family, spec, read_config(folder, family.lora_prefix))
    inputs = BuildInputs(
        base=spec.name,
        base_hash=hash_of_base,
        loras=tuple(LoraRecord(name=lora.name, weights_hash=lora_hash(lora), weight=weight) for lora, weight in found),
        model=spec,
        guidance=options.guidance,
        backend=options.backend,
        precision=options.precision,
        sizes=spec.sizes,
        batch_sizes=options.batch_sizes,
        library_versions=_versions((*EXPORTERS, *backend.packages)),
        version_compatible=options.version_compatible,
        code=_code_hash(),
        machine=machine,
    )
    plan = BuildPlan(
        options=options,
        backend=backend,
        family=family,
        folder=folder,
        spec=spec,
        inputs=inputs,
        exports=tuple(_exports(backend.graph, family, inputs)) if backend.graph else (),
        parameters=_parameters(folder, family),
        previous=previous,
        flaw=flaw,
    )
    if plan.changes:
        backend.check_runs()
        _check_disk(plan)
    return plan


def describe(plan: BuildPlan) -> Iterator[str]:
    """The plan for people: what, why, and what it takes."""
    inputs, spec = plan.inputs, plan.spec
    loras = "".join(f" + {lora.name} x {lora.weight:g}" for lora in inputs.loras)
    yield f"base         {plan.folder} ({plan.family.name}, {inputs.base_hash[:12]}){loras}"
    yield f"backend      {inputs.backend}, {inputs.precision}, on {inputs.machine.device} ({inputs.machine.processor})"
    yield f"fingerprint  {inputs.fingerprint[:12]}"
    for part in plan.parameters:
        yield f"{part:12} {plan.parameters[part] / 1e6:.1f} M parameters, {_export_state(plan, part)}"
    sizes = ", ".join(map(str, inputs.sizes))
    shape = " x ".join(map(str, spec.latent_shape(spec.sizes[0])))
    yield f"buckets      batch {', '.join(map(str, inputs.batch_sizes))} at {sizes}; latents {shape} at {spec.sizes[0]}"
    for place, needed in plan.disk_bytes.items():
        yield f"disk         {needed / 1e9:.2f} GB at most in {place} ({_free_bytes(place) / 1e9:.0f} GB free)"
    yield f"memory       about {plan.memory_bytes / 1e9:.1f} GB at the peak (an estimate from the number of parameters)"
    yield f"time         about {_expected_s(plan):.0f} s (an estimate; one core, small models)"
    for reason in plan.changes or [f"nothing: {plan.options.out} is up to date"]:
        yield f"to do        {reason}"


def _expected_s(plan: BuildPlan) -> float:
    """Of builds of small models: exporting takes a while however small a part is, and so does each bucket. Weights come on top:
    a second per five million parameters, where networks of real size took one per 7 to 18 million (docs/engines.md)."""
    if not plan.changes:
        return 0.0
    seconds = {"text_encoder": 5, "encoder": 6, "denoiser": 25, "decoder": 6}
    to_export = [export for export in plan.exports if not export.is_cached]
    exporting = sum(seconds[export.part] + plan.parameters[export.part] / 5e6 for export in to_export)
    return 8 + exporting + 2 * plan.buckets * (1 + max(plan.parameters.values()) / 100e6)


def _export_state(plan: BuildPlan, part: str) -> str:
    if not plan.backend.graph:
        return "saved as they are"
    return "in the cache" if all(export.is_cached for export in plan.exports if export.part == part) else "to export"


def _previous(out: Path) -> tuple[Manifest | None, str | None]:
    """The bundle that a build would replace, or what is wrong with it; BundleError when something else is in its place."""
    if not out.exists():
        return None, None
    if not (out / MANIFEST).is_file():
        raise BundleError(f"{out} exists already and is not a bundle; choose another --out or remove it")
    try:
        return read_manifest(out), None
    except BundleError as error:
        return None, str(error)


def _check_shapes(options: BuildOptions, family: ModelFamily, spec: ModelSpec, denoiser: dict[str, object]) -> None:
    step = family.size_step(denoiser) * spec.latent_factor
    largest = family.largest_side(denoiser)
    for size in options.sizes:
        if size.width % step or size.height % step or min(size) <= 0:
            raise BundleError(f"--size {size}: {family.name} needs width and height in multiples of {step}")
        if largest and max(size) > largest * spec.latent_factor:
            raise BundleError(f"--size {size}: this base has positions for at most {largest * spec.latent_factor} pixels a side")
    if options.batch_sizes[-1] < spec.sampler.evaluations_per_step:
        raise BundleError(f"--batch must reach {spec.sampler.evaluations_per_step}: guidance evaluates the network twice a step")


def _check_disk(plan: BuildPlan) -> None:
    """BundleError when the disks cannot take what the build may write."""
    by_disk: dict[int, tuple[Path, int]] = {}
    for place, needed in plan.disk_bytes.items():
        existing = _existing(place)
        device = existing.stat().st_dev
        by_disk[device] = (place, by_disk.get(device, (place, 0))[1] + needed)
    for place, needed in by_disk.values():
        free = _free_bytes(place)
        if needed > free:
            raise BundleError(f"{place}: the build needs {needed / 1e9:.1f} GB there, {free / 1e9:.1f} GB are free; make room")


def _existing(place: Path) -> Path:
    return next(folder for folder in (place, *place.parents) if folder.exists())


def _free_bytes(place: Path) -> int:
    return shutil.disk_usage(_existing(place)).free


def _exports(form: GraphForm, family: ModelFamily, inputs: BuildInputs) -> Iterator[Export]:
    """The graphs to export."""
    versions = {name: inputs.library_versions.get(name) for name in form.packages}
    denoiser = inputs.model.parts_in(Phase.STEP)[-1].name  # what the LoRAs are fused into
    for part in (spec.name for spec in inputs.model.parts):
        is_fixed = part == denoiser and family.fixed_size
        for size in inputs.sizes if is_fixed else (None,):
            deciding = {
                "part": part,
                "base": inputs.base_hash,
                "loras": [[lora.weights_hash, lora.weight] for lora in inputs.loras] if part == denoiser else [],
                "form": form.file,
                "precision": inputs.precision,
                "example": size or inputs.sizes[0],
                "times": inputs.model.sampler.known_times if part == denoiser else [],
                "versions": versions,
                "code": inputs.code,
            }
            key = key_of(f"export-{part}", deciding)
            yield Export(part=part, size=size, key=key, is_cached=is_cached(key))


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names if _is_installed(name)}


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _code_hash() -> str:
    """Of what decides how a model is loaded, fused, exported, compiled and checked."""
    root = Path(flashdiff.__file__).parent
    files = [
        *(root / "engines").rglob("*.py"),
        *(root / "families").glob("*.py"),
        root / "lora.py",
        root / "kohya.py",
        root / "parts.py",
    ]
    return hash_files(root, files)


def _parameters(folder: Path, family: ModelFamily) -> dict[str, int]:
    """Parameters by part, read off the headers of the weights."""

    def count(pattern: str, prefixes: tuple[str, ...] = ("",)) -> int:
        total = 0
        for file in folder.glob(f"{pattern}/*.safetensors"):
            if file.stem.count(".") == 0:  # model.fp16.safetensors is the same once more
                total += _tensor_elements(file, prefixes)
        return total

    return {
        "text_encoder": count("text_encoder*"),
        "encoder": count("vae", ("encoder.", "quant_conv.")),
        "denoiser": count(family.lora_prefix),
        "decoder": count("vae", ("decoder.", "post_quant_conv.")),
    }


def _tensor_elements(file: Path, prefixes: tuple[str, ...]) -> int:
    """Of the tensors whose names start with one of these."""
    try:
        with safetensors.safe_open(file, "np") as weights:
            names = [name for name in weights.keys() if name.startswith(prefixes)]  # noqa: SIM118  # not a mapping
            shapes = [weights.get_slice(name).get_shape() for name in names]
    except Exception:  # a damaged file is named when it is loaded
        return 0
    total = 0
    for shape in shapes:
        elements = 1
        for side in shape:
            elements *= side
        total += elements
    return total


def _differences(old: BuildInputs, new: BuildInputs) -> Iterator[str]:
    """What changed between two builds, one line each."""
    if old.base_hash != new.base_hash:
        yield f"the base changed: {old.base} {old.base_hash[:12]} -> {new.base} {new.base_hash[:12]}"
    before, after = ({lora.name: lora for lora in inputs.loras} for inputs in (old, new))
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            yield f"LoRA {name} was removed"
        elif name not in before:
            yield f"LoRA {name} was added"
        elif before[name].weights_hash != after[name].weights_hash:
            yield f"LoRA {name} was trained anew: {before[name].weights_hash[:12]} -> {after[name].weights_hash[:12]}"
        elif before[name].weight != after[name].weight:
            yield f"LoRA {name}: weight {before[name].weight:g} -> {after[name].weight:g}"
    for field in ("guidance", "backend", "precision", "sizes", "batch_sizes", "version_compatible"):
        then, now = getattr(old, field), getattr(new, field)
        if then != now:
            yield f"{field.replace('_', ' ')}: {_words(then)} -> {_words(now)}"
    if old.base_hash == new.base_hash and (old.loras, old.guidance) == (new.loras, new.guidance):
        # The weights are the same, so what changed stands beside them.
        for field in ("prediction", "sampler", "tokenizers", "parts", "conditions", "tasks"):
            if getattr(old.model, field) != getattr(new.model, field):
                yield f"another {field}: flash.json or the base's configuration changed"
    for name in sorted({*old.library_versions, *new.library_versions}):
        then, now = old.library_versions.get(name, "none"), new.library_versions.get(name, "none")
        if then != now:
            yield f"{name}: {then} -> {now}"
    if old.code != new.code:
        yield "flashdiff's own code changed"
    if old.machine != new.machine:
        yield f"another machine: {old.machine.processor} -> {new.machine.processor}"


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "default" if value is None else str(value)
