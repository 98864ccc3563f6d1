"""What a build would make, and why, from configuration files and hashes alone: no weights are loaded."""

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import flashdiff
from flashdiff import defaults
from flashdiff.components import ModelSpec
from flashdiff.controls import steered, unsteered
from flashdiff.engines.backends import find_backend
from flashdiff.engines.backends.base import EXPORTERS, Backend, Export, GraphForm
from flashdiff.engines.bundle import (
    MANIFEST,
    MAX_ELEMENTS,
    NOT_COMPARED,
    QUANTIZED,
    BuildInputs,
    Calibration,
    ControlRecord,
    LoraRecord,
    Manifest,
    Precision,
    ReferenceRecord,
    VaeRecord,
    read_manifest,
)
from flashdiff.engines.cache import is_cached, key_of
from flashdiff.engines.calibration import find_prompts, orders_of
from flashdiff.engines.config import BuildOptions
from flashdiff.engines.describe import describe_sampler
from flashdiff.engines.differences import differences
from flashdiff.engines.requirements import Requirements, count_parameters, estimate, free_bytes
from flashdiff.errors import BackendError, BundleError
from flashdiff.evaluation.images import Prompt
from flashdiff.families import family_of, find_base
from flashdiff.families.autoencoders import check_vae, vae_for
from flashdiff.families.base import ModelFamily
from flashdiff.families.control import check_control, find_control, reads_latents
from flashdiff.families.files import base_files, base_hash
from flashdiff.families.hub import name_of
from flashdiff.families.ip_adapter import ENCODER_FOLDER, Found, check_adapter, encoder_files, encoder_hash, find_adapter
from flashdiff.families.loading import size_limits
from flashdiff.families.made_for import MadeFor
from flashdiff.families.networks import files_of_network, hash_of_network
from flashdiff.families.slots import layers_of_base
from flashdiff.files import counted, hash_file, hash_files, shown_bytes
from flashdiff.lora import (
    check_base,
    find_lora,
    fused_spec,
    lora_files,
    lora_hash,
    lora_name,
    read_metadata,
    touches_text,
)
from flashdiff.lora_requests import slots_of, slotted, unslotted
from flashdiff.reading import Witness, first_change, witness
from flashdiff.references import ENCODER, referred, unreferred
from flashdiff.samplers.options import SamplingOptions
from flashdiff.samplers.recognise import few_step_hint
from flashdiff.tasks import tasks_of
from flashdiff.tasks.samples import needed_inputs

_EMBEDDED = "avatars"
_LONGEST_TITLE = 200
_LEAST_TILE = 8  # latent cells of a side that is decoded at once
_FEW_STEP_KINDS = ("flash", "lcm", "tcd", "flow-euler")


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """The options of a build, the models found for them, and what must be built."""

    options: BuildOptions
    backend: Backend
    family: ModelFamily
    folder: Path
    """Of the base model."""
    vae: Path | None
    """The folder of the autoencoder in the place of the base's own."""
    controls: Mapping[str, Path]
    """The folders of the control networks, by name."""
    adapter: Found | None
    """The IP-Adapter, where requests may bring a reference."""
    loras: tuple[tuple[Path, float], ...]
    """What was found for their names, and their weights."""
    spec: ModelSpec
    inputs: BuildInputs
    exports: tuple[Export, ...]
    requirements: Requirements
    previous: Manifest | None
    """The bundle at `out` now."""
    flaw: str | None
    """Why what is at `out` is not a bundle that can be brought up to date."""
    sources: Witness
    """The files of the base and the LoRAs, as they were before any was read."""
    prompts: tuple[Prompt, ...]
    """Those that calibrate; empty where the build neither quantizes nor measures quality."""
    warnings: tuple[str, ...]
    """Options that look wrong; the build reports them and continues."""

    @property
    def machine(self) -> str:
        """Backend, precision and device, in words."""
        inputs = self.inputs
        chosen = "" if "backend" in self.options.model_fields_set else "; the fastest here"
        compiled = ", compiled" if inputs.compiled else ""
        return f"{inputs.backend}, {inputs.precision}{compiled}, on {inputs.machine.device} ({inputs.machine.processor}){chosen}"

    @property
    def changes(self) -> list[str]:
        """Why `out` has to be built, in plain words; empty when it is up to date."""
        if self.previous is None:
            return [self.flaw or f"there is no bundle at {self.options.out} yet"]
        if self.previous.fingerprint == self.inputs.fingerprint:
            skipped = self.previous.stock == NOT_COMPARED and self.options.compare_stock
            return ["it was not compared with the stock pipeline"] if skipped else []
        return list(differences(self.previous, self.inputs)) or ["its options changed"]

    def check_sources(self) -> None:
        """BundleError when a file of the base or of a LoRA was edited or replaced since: the hashes would name other bytes."""
        now = witness(_sources(self.folder, self.vae, self.controls, self.adapter, self.loras))
        if changed := first_change(self.sources, now):
            raise BundleError(f"{changed} changed while the build read it; start again when its files stay as they are")


def plan_build(options: BuildOptions, *, with_quality: bool = False) -> BuildPlan:
    """Check the options against the base, the LoRAs, this machine and the disk, and say what has to be done.

    `with_quality` measures the quality of any precision, not of int8 alone; the precision is a given one, never `auto`.
    BundleError, LoraError, ModelError or BackendError name what does not fit.
    """
    previous, flaw = _previous(options.out)
    backend = find_backend(options.backend)
    machine = backend.machine()
    assert options.precision != "auto"
    precision: Precision = options.precision
    backend.check_computes(precision, machine)
    backend.check_build(precision, machine)
    backend.import_modules()  # so that a missing library is reported now, not after minutes of exporting
    if options.compile:
        if backend.check_compile is None:
            raise BackendError(
                f"--compile: it is for --backend torch; what {backend.name} runs is always compiled by its library"
            )
        backend.check_compile(precision)
    if options.version_compatible and not backend.has_version_compatible:
        raise BackendError(f"--version-compatible: it is for TensorRT's plans, and not for --backend {backend.name}")
    folder = find_base(options.base, variant=options.variant, config=options.config)
    family = family_of(folder)
    loras = tuple((find_lora(name), weight) for name, weight in options.loras)
    vae = vae_for(options.vae, family, folder) if options.vae else None
    controls = {name: find_control(name, place) for name, place in options.controls}
    adapter = find_adapter(options.reference, options.reference_encoder) if options.reference else None
    sources = witness(_sources(folder, vae, controls, adapter, loras))
    spec = fused_spec(family.read_spec(folder), [folder, *(lora for lora, _ in loras)], options)
    hash_of_base = base_hash(folder)
    if vae:
        check_vae(vae, family, spec, folder)
    kinds = {name: check_control(name, place, family, folder, spec) for name, place in controls.items()}
    kind = check_adapter(adapter, family, folder, spec) if adapter else None
    of_base = check_base(folder, hash_of_base, [lora for lora, _ in loras])
    spec = spec.model_copy(update={"sizes": options.sizes or spec.sizes, "decode_tile": options.decode_tile})
    spec = referred(spec, kind.tokens, kind.side) if kind else spec
    spec = steered(spec, list(controls), reads_latents(family, kinds))
    _check_shapes(options, family, spec, *size_limits(folder, family))
    calibration: Calibration | None = None
    prompts: tuple[Prompt, ...] = ()
    if precision in QUANTIZED or with_quality:
        if needed_inputs(spec, spec.sizes[0]):
            raise BundleError(
                f"--precision int8, fp8 and auto need images of prompts, and {spec.name} makes no image of a prompt alone; "
                "take fp32, fp16 or bf16"
            )
        is_world = MadeFor.of(_EMBEDDED, find_base(_EMBEDDED)).is_in(folder)
        calibration, prompts = find_prompts(options.calibration_prompts, is_world=is_world)
    rank = (options.lora_rank or defaults.LORA_RANK) if options.lora_slots else 0
    spec = _with_slots(spec, folder, family, options, rank)
    orders_of(spec, prompts)  # so that a prompt that the model refuses is reported now
    quantizers = backend.quantizer_packages if precision in backend.quantize else ()
    inputs = BuildInputs(
        base=spec.name,
        base_hash=hash_of_base,
        vae=VaeRecord(name=_name_of_vae(vae), weights_hash=hash_of_network(vae)) if vae else None,
        controls=tuple(
            ControlRecord(name=name, source=_name_of_control(folder), kind=kinds[name], weights_hash=hash_of_network(folder))
            for name, folder in controls.items()
        ),
        reference=_reference_record(adapter, kind.name) if adapter and kind else None,
        loras=tuple(LoraRecord(name=lora_name(lora), weights_hash=lora_hash(lora), weight=weight) for lora, weight in loras),
        lora_slots=options.lora_slots,
        lora_rank=rank,
        model=spec,
        guidance=options.guidance,
        sampling=SamplingOptions(**{name: getattr(options, name) for name in SamplingOptions.model_fields if name != "guidance"}),
        backend=options.backend,
        precision=precision,
        calibration=calibration,
        sizes=spec.sizes,
        batch_sizes=options.batch_sizes,
        library_versions=_versions((*EXPORTERS, *backend.packages, *quantizers)),
        version_compatible=options.version_compatible,
        compiled=options.compile,
        code=_code_hash(),
        machine=machine,
    )
    on_text = [touches_text(lora) for lora, _ in loras]
    exports = tuple(_exports(backend, backend.graph, family, inputs, on_text)) if backend.graph else ()
    plan = BuildPlan(
        options=options,
        backend=backend,
        family=family,
        folder=folder,
        vae=vae,
        controls=controls,
        adapter=adapter,
        loras=loras,
        spec=spec,
        inputs=inputs,
        exports=exports,
        requirements=estimate(
            backend, inputs, exports, count_parameters(folder, family, spec, controls.values(), adapter), options.out
        ),
        previous=previous,
        flaw=flaw,
        sources=sources,
        prompts=prompts,
        warnings=(*of_base, *_hints(options, spec, [lora for lora, _ in loras]), *filter(None, [backend.idle_gpu()])),
    )
    plan.check_sources()
    if plan.changes:
        backend.check_runs()
        plan.requirements.check_disk()
    return plan


def describe(plan: BuildPlan) -> Iterator[str]:
    """The plan for people: what, why, and what it takes."""
    inputs, spec, needed = plan.inputs, plan.spec, plan.requirements
    loras = "".join(f" + {lora.name} x {lora.weight:g}" for lora in inputs.loras)
    yield f"base         {plan.folder} ({plan.family.name}, {inputs.base_hash[:12]}){loras}"
    if inputs.vae:
        yield f"autoencoder  {plan.vae} ({inputs.vae.weights_hash[:12]})"
    for control in inputs.controls:
        yield f"control      {control.name}: {plan.controls[control.name]} ({control.kind}, {control.weights_hash[:12]})"
    if plan.adapter and inputs.reference:
        yield f"reference    {plan.adapter.file} ({inputs.reference.kind}, {inputs.reference.weights_hash[:12]})"
        yield f"             read by {plan.adapter.encoder} ({inputs.reference.encoder_hash[:12]})"
    if inputs.lora_slots:
        yield f"LoRA slots   {inputs.lora_slots}, of rank {inputs.lora_rank} each"
    yield f"backend      {plan.machine}"
    yield f"sampler      {describe_sampler(spec)}"
    if inputs.calibration:
        yield f"calibration  {counted(inputs.calibration.prompts, 'prompt')} of {inputs.calibration.source}"
    for warning in plan.warnings:
        yield f"warning      {warning}"
    yield f"fingerprint  {inputs.fingerprint[:12]}"
    for part in needed.parameters:
        yield f"{part:12} {needed.parameters[part] / 1e6:.1f} M parameters, {_export_state(plan, part)}"
    sizes = ", ".join(map(str, inputs.sizes))
    shape = " x ".join(map(str, spec.latent_shape(spec.sizes[0])))
    yield f"buckets      batch {', '.join(map(str, inputs.batch_sizes))} at {sizes}; latents {shape} at {spec.sizes[0]}"
    if spec.decode_tile:
        yield f"decoded      in tiles of at most {spec.decode_tile} pixels a side"
    for place, size in needed.disk_bytes.items():
        yield f"disk         {shown_bytes(size)} at most in {place} ({shown_bytes(free_bytes(place))} free)"
    yield f"memory       about {shown_bytes(needed.memory_bytes)} at the peak (an estimate from the number of parameters)"
    yield f"time         about {needed.seconds if plan.changes else 0:.0f} s (an estimate; one core, small models)"
    for reason in plan.changes or [f"nothing: {plan.options.out} is up to date"]:
        yield f"to do        {reason}"


def _sources(
    folder: Path,
    vae: Path | None,
    controls: Mapping[str, Path],
    adapter: Found | None,
    loras: Sequence[tuple[Path, float]],
) -> list[Path]:
    """All files that a build reads."""
    networks = [*([vae] if vae else []), *controls.values()]
    return [
        *base_files(folder),
        *(file for network in networks for file in files_of_network(network)),
        *([adapter.file, *encoder_files(adapter.encoder)] if adapter else []),
        *(file for lora, _ in loras for file in lora_files(lora)),
    ]


def _name_of_vae(vae: Path) -> str:
    """A folder `vae` is a base's."""
    return f"{name_of(vae.parent)}/vae" if vae.name == "vae" else name_of(vae)


def _name_of_control(folder: Path) -> str:
    """A folder `controlnet` lies in one that has the name."""
    return name_of(folder.parent) if folder.name in ("controlnet", "t2iadapter") else name_of(folder)


def _reference_record(adapter: Found, kind: str) -> ReferenceRecord:
    folder = adapter.encoder
    return ReferenceRecord(
        name=adapter.file.name,
        kind=kind,
        weights_hash=hash_file(adapter.file),
        encoder=f"{name_of(folder.parent)}/{folder.name}" if folder.name == ENCODER_FOLDER else name_of(folder),
        encoder_hash=encoder_hash(folder),
    )


def _with_slots(spec: ModelSpec, folder: Path, family: ModelFamily, options: BuildOptions, rank: int) -> ModelSpec:
    if not options.lora_slots:
        return spec
    values = rank * sum(layer.inputs + layer.outputs for layer in layers_of_base(folder, family))
    batch = options.batch_sizes[-1]
    if values * batch > MAX_ELEMENTS:
        raise BundleError(
            f"--lora-rank {rank}: at --batch {batch} a slot would have {values * batch} values, and a tensor has at most "
            f"{MAX_ELEMENTS}; give less of the one or the other"
        )
    return slotted(spec, options.lora_slots, values)


def _hints(options: BuildOptions, spec: ModelSpec, loras: Sequence[Path]) -> Iterator[str]:
    """One for a few-step student, by its name or its file's metadata, that would be sampled by dozens of steps."""
    if options.names_sampler or spec.sampler.kind in _FEW_STEP_KINDS:
        return
    candidates = [(str(lora), [lora.name, lora_name(lora), *read_metadata(lora).values()]) for lora in loras]
    for source, names in [*candidates, (options.base, [options.base, Path(options.base).resolve().name])]:
        short = [name for name in names if len(name) <= _LONGEST_TITLE]  # what is longer is a table of training data
        if hint := few_step_hint(spec.family, short):
            sampling = f"{spec.sampler.default_steps} steps of {spec.sampler.kind}, guidance {spec.sampler.guidance:g}"
            yield f"{source} looks like a few-step student and would be sampled by {sampling}; if it is one, add {hint}"
            return


def _export_state(plan: BuildPlan, part: str) -> str:
    if not plan.backend.graph:
        return "to compile" if plan.inputs.compiled else "saved as they are"
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


def _check_shapes(options: BuildOptions, family: ModelFamily, spec: ModelSpec, step: int, largest: int | None) -> None:
    step *= spec.latent_factor
    for size in options.sizes:
        if size.width % step or size.height % step or min(size) <= 0:
            raise BundleError(f"--size {size}: {family.name} needs width and height in multiples of {step}")
        if largest and max(size) > largest * spec.latent_factor:
            raise BundleError(f"--size {size}: this base has positions for at most {largest * spec.latent_factor} pixels a side")
    if (tile := options.decode_tile) is not None:
        if tile % step or tile < _LEAST_TILE * spec.latent_factor:
            raise BundleError(
                f"--decode-tile {tile}: give a multiple of {step} pixels for {family.name}, at least "
                f"{_LEAST_TILE * spec.latent_factor}"
            )
        if tile >= (most := max(map(max, spec.sizes))):
            raise BundleError(f"--decode-tile {tile}: no image has a longer side than {most}; leave it out")
    is_calibrated = options.precision in find_backend(options.backend).quantize
    if is_calibrated and family.fixed_size and len(spec.sizes) > 1:
        raise BundleError(
            f"--precision {options.precision}: {family.name} has a network a size, and one is calibrated; give one --size"
        )
    if options.batch_sizes[-1] < (slots := max(task.evaluations_per_step(spec) for task in tasks_of(spec))):
        times = {2: "twice", 3: "three times"}[slots]
        raise BundleError(f"--batch must reach {slots}: guidance evaluates the network {times} a step")


def _exports(
    backend: Backend, form: GraphForm, family: ModelFamily, inputs: BuildInputs, on_text: Sequence[bool]
) -> Iterator[Export]:
    """The graphs to export; `on_text` says of every LoRA whether it changes a text encoder."""
    versions = {name: inputs.library_versions.get(name) for name in form.packages}
    denoisers = [part.name for part in inputs.model.denoisers]
    loras = [[lora.weights_hash, lora.weight] for lora in inputs.loras]
    changing = {
        **dict.fromkeys(denoisers, loras),
        inputs.model.text_part.name: [lora for lora, is_on_text in zip(loras, on_text, strict=True) if is_on_text],
    }
    # All of the model but what no graph contains: members of two families may share their weights.
    plain, sampler = unreferred(unsteered(unslotted(inputs.model))), inputs.model.sampler
    model = plain.model_dump(mode="json", exclude={"name", "sizes", "decode_tile", "tasks", "sampler"})
    controls = [[control.name, control.weights_hash] for control in inputs.controls]
    adapter = inputs.reference and [inputs.reference.weights_hash, inputs.reference.encoder_hash]
    reading = dict.fromkeys([*denoisers, ENCODER], adapter)
    slots = {slot.name: inputs.lora_rank for slot in slots_of(inputs.model)}
    # Some families' parts hold the guidance that their network takes as an input.
    held = sampler.model_dump(mode="json", include={"schedule", "embedded_guidance"})
    times = {"type": sampler.time_type, "known": sampler.known_times}
    for part in (spec.name for spec in inputs.model.parts):
        # A graph without control networks, an IP-Adapter or slots is that of the model without them.
        taken = {condition.enters for condition in inputs.model.conditions if condition.name in inputs.model.part(part).inputs}
        is_fixed = part in denoisers and family.fixed_size
        for size in inputs.sizes if is_fixed else (None,):
            deciding = {
                "part": part,
                "base": inputs.base_hash,
                "vae": inputs.vae.weights_hash if inputs.vae and family.weights_of(part)[0] == "vae" else None,
                "model": model | held,
                "loras": changing.get(part, []),
                "controls": controls if "residual" in taken else [],
                "reference": reading.get(part),
                "slots": slots if "weights" in taken else {},
                "form": form.file,
                "precision": backend.graph_precision(inputs.precision),
                "example": size or inputs.sizes[0],
                "times": times if part in denoisers else None,
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
    """Of what decides how a model is loaded, fused, exported, compiled, calibrated and checked."""
    root = Path(flashdiff.__file__).parent
    folders, modules = ("engines", "families", "samplers", "tasks"), (
        "controls", "generate", "noise", "parts", "prediction", "references", "rows", "sampling", "schedule",
        "tensor_file", "text",
    )  # fmt: skip
    files = [
        *(file for folder in folders for file in (root / folder).rglob("*.py")),
        *root.glob("lora*.py"),
        *(root / f"{name}.py" for name in modules),
    ]
    return hash_files(root, files)
