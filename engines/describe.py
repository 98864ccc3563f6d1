"""A bundle's manifest as readable lines."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from flashdiff.components import ModelSpec
from flashdiff.engines.backends import find_backend
from flashdiff.engines.bundle import Manifest, Quality, StockComparison, replaced_by
from flashdiff.errors import BackendError, BundleError
from flashdiff.files import counted


def describe(bundle: Path, manifest: Manifest) -> Iterator[str]:
    """The manifest of a checked bundle, line by line: origin, abilities, exactness, costs, files."""
    model, codec = manifest.model, manifest.latent_codec
    yield f"bundle       {bundle} ({manifest.bundle_hash[:12]}), every file as it was published"
    yield f"made by      flashdiff {manifest.flashdiff_version}, " + ", ".join(
        f"{name} {version}" for name, version in manifest.library_versions.items()
    )
    yield f"base         {manifest.base} ({model.family}, {manifest.base_hash[:12]})"
    if manifest.vae:
        apart = "" if manifest.vae_psnr is None else f", {manifest.vae_psnr:.1f} dB from the base's own decoder"
        yield f"autoencoder  {manifest.vae.name} ({manifest.vae.weights_hash[:12]}){apart}"
    for lora in manifest.loras:
        yield f"LoRA         {lora.name} x {lora.weight:g} ({lora.weights_hash[:12]})"
    for control in manifest.controls:
        yield f"control      {control.name}: {control.source} ({control.kind}, {control.weights_hash[:12]})"
    if reference := manifest.reference:
        yield f"reference    {reference.name} ({reference.kind} IP-Adapter, {reference.weights_hash[:12]})"
        yield f"             read by {reference.encoder} ({reference.encoder_hash[:12]})"
    if manifest.lora_slots:
        yield f"LoRA slots   {manifest.lora_slots}, of rank {manifest.lora_rank} each"
    compiled = ", compiled" if manifest.compiled else ""
    yield f"engine       {manifest.backend}, {manifest.precision}{compiled}, on {_machine(manifest)}"
    yield f"fits here    {_fit(manifest)}"
    preset = f" ({manifest.sampling.preset})" if manifest.sampling.preset else ""
    yield f"sampler      {describe_sampler(model)}{preset}"
    scaled = "each channel scaled on its own" if codec.scale is None else f"(z - {codec.shift:g}) x {codec.scale:g}"
    yield f"latents      {codec.channels} channels, {codec.factor} pixels a cell, {scaled}"
    yield f"buckets      batch {', '.join(map(str, manifest.batch_sizes))} at {', '.join(map(str, model.sizes))}"
    if model.decode_tile:
        yield f"decoded      in tiles of at most {model.decode_tile} pixels a side"
    exact = "the same bits in every batch" if manifest.rows_are_exact else "not bit-equal across batch sizes"
    yield f"rows         {exact}"
    width = max(12, *map(len, (*manifest.max_error, *manifest.parts)))
    for name, error in manifest.max_error.items():
        other, allowed = replaced_by(model, name) or "torch", manifest.max_error_allowed[name]
        yield f"{'off ' + other:12} {name:{width}} {error:.1e} (allowed {allowed:.0e})"
    if manifest.quantization:
        yield f"{manifest.precision:12} {describe_quantization(manifest)}"
    if manifest.quality:
        yield f"quality      {describe_quality(manifest.quality)}"
    if manifest.chosen:
        yield f"chosen       {manifest.chosen}"
    yield f"off stock    {describe_stock(manifest.stock, width)}"
    for part in manifest.parts:
        for size in model.sizes_of(part) if manifest.parts[part].is_spatial else (None,):
            costs = [f"{c.batch}: {c.ms:.1f}" for c in manifest.step_costs if c.part == part and c.size == size]
            yield f"ms by batch  {part:{width}} {str(size) + '  ' if size else ''}{', '.join(costs)}"
    for name in sorted(manifest.files):
        yield f"file         {(bundle / name).stat().st_size / 1e6:8.2f} MB  {name}"


def describe_errors(spec: ModelSpec, errors: Mapping[str, float]) -> str:
    """What parts and the image differ by, and from what, in one line."""
    found: dict[str, list[str]] = {}
    for name, error in errors.items():
        other = replaced_by(spec, name)
        found.setdefault(f"the bundle's own {other}" if other else "torch", []).append(f"{name} {error:.1e}")
    return "; ".join(f"{', '.join(listed)} off {other}" for other, listed in found.items())


def describe_quantization(manifest: Manifest) -> str:
    """What is rounded, and what it was calibrated on, in one line."""
    done, calibration = manifest.quantization, manifest.calibration
    assert done
    assert calibration
    rest = find_backend(manifest.backend).rest[manifest.precision]
    kept = f", {len(done.kept)} in {rest} ({', '.join(done.kept)})" if done.kept else ""
    tries = "the first try" if done.tries == 1 else f"try {done.tries}"
    return (
        f"{done.part}: {done.layers} layers in {manifest.precision}{kept}, after {tries}; calibrated on {done.rows} rows, of "
        f"prompts of {calibration.source} ({calibration.prompts_hash[:12]})"
    )


def describe_quality(quality: Quality) -> str:
    """How near the images are to float32's, in one line."""
    line = f"{counted(quality.images, 'image')} of {counted(quality.steps, 'step')}: {quality.psnr:.1f} dB from torch in float32"
    if quality.attributes:
        line += "; large attributes {1:.1%}, in float32 {0:.1%}".format(*quality.attributes)
    if quality.kid:
        line += "; KID x1000 {1:.2f}, in float32 {0:.2f}".format(*quality.kid)
    return line


def describe_stock(stock: StockComparison | str, width: int = 12) -> str:
    """The comparison with the stock pipeline, or why there is none, in one line; `width` is that of its first column."""
    if isinstance(stock, str):
        return f"not compared: {stock}"
    return (
        f"{'image':{width}} {stock.error:.1e} (allowed {stock.allowed:.1e}; torch {stock.torch_error:.1e}), {stock.steps} steps "
        f"at {stock.size} of {stock.made_by}"
    )


def describe_sampler(model: ModelSpec) -> str:
    """How a model is sampled, in one line."""
    sampler = model.sampler
    if sampler.grid:
        steps = range(1, sampler.max_steps + 1)
        return f"flash, {model.prediction}; " + "; ".join(f"{n} steps at {sampler.times(n)}" for n in steps)
    embedded = "" if sampler.embedded_guidance is None else f", embedded guidance {sampler.embedded_guidance:g}"
    guidance = f"guidance {sampler.guidance:g}" if sampler.evaluations_per_step > 1 else "without guidance"
    kind = sampler.published
    if kind is None:
        return f"ODE, {model.prediction}, up to {sampler.max_steps} steps, {guidance}{embedded}"
    settings = {
        "spacing": sampler.spacing if kind.spacings and not sampler.timesteps else None,
        "eta": f"{sampler.eta:g}" if "eta" in kind.settings else None,
        "original steps": sampler.original_steps if "original_steps" in kind.settings and not sampler.timesteps else None,
    }
    shown = "".join(f", {name} {value}" for name, value in settings.items() if value is not None)
    times = [round(time, 2) for time in sampler.times(sampler.default_steps)]
    return (
        f"{sampler.kind}, {model.prediction}{shown}, up to {sampler.max_steps} steps, {guidance}{embedded}; "
        f"{sampler.default_steps} by default, at {times}"
    )


def _machine(manifest: Manifest) -> str:
    machine = manifest.machine
    return (
        f"{machine.device} ({machine.processor}, {machine.system}{', ' if machine.features else ''}{' '.join(machine.features)})"
    )


def _fit(manifest: Manifest) -> str:
    try:
        find_backend(manifest.backend).check_machine(manifest)
    except (BackendError, BundleError) as error:
        return f"no: {error}"
    return "yes"
