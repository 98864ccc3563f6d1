"""What changed between two builds, in plain words."""

from collections.abc import Iterator

from flashdiff.engines.bundle import BuildInputs
from flashdiff.samplers.options import SamplingOptions


def differences(old: BuildInputs, new: BuildInputs) -> Iterator[str]:
    """What changed between two builds, one line each."""
    if old.base_hash != new.base_hash:
        yield f"the base changed: {old.base} {old.base_hash[:12]} -> {new.base} {new.base_hash[:12]}"
    if (old.vae and old.vae.weights_hash) != (new.vae and new.vae.weights_hash):
        then, now = (f"{vae.name} {vae.weights_hash[:12]}" if vae else "the base's own" for vae in (old.vae, new.vae))
        yield f"the autoencoder changed: {then} -> {now}"
    yield from _controls(old, new)
    yield from _reference(old, new)
    if (old.calibration and old.calibration.prompts_hash) != (new.calibration and new.calibration.prompts_hash):
        then, now = (f"{c.prompts} of {c.source}" if (c := inputs.calibration) else "none" for inputs in (old, new))
        yield f"calibration prompts: {then} -> {now}"
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
    listed = [[(lora.weights_hash, lora.weight) for lora in inputs.loras] for inputs in (old, new)]
    if before == after and listed[0] != listed[1]:  # two have one name, or the order is another
        yield "LoRAs, their order or their weights changed"
    for field in (
        "guidance",
        "backend",
        "precision",
        "sizes",
        "batch_sizes",
        "lora_slots",
        "lora_rank",
        "version_compatible",
        "compiled",
    ):
        then, now = getattr(old, field), getattr(new, field)
        if then != now:
            yield f"{field.replace('_', ' ')}: {_words(then)} -> {_words(now)}"
    if old.model.decode_tile != new.model.decode_tile:
        yield f"decode tile: {_words(old.model.decode_tile)} -> {_words(new.model.decode_tile)}"
    for field in SamplingOptions.model_fields:
        then, now = getattr(old.sampling, field), getattr(new.sampling, field)
        if then != now:
            yield f"{field}: {_words(then)} -> {_words(now)}"
    if old.base_hash == new.base_hash and _asked(old) == _asked(new):
        # The weights are the same, so a configuration file next to them changed.
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


def _asked(inputs: BuildInputs) -> tuple[object, ...]:
    """What of a build's options decides the model's spec."""
    names = [control.name for control in inputs.controls]
    return inputs.loras, inputs.lora_slots, inputs.lora_rank, inputs.reference, inputs.guidance, inputs.sampling, names


def _controls(old: BuildInputs, new: BuildInputs) -> Iterator[str]:
    before, after = ({control.name: control for control in inputs.controls} for inputs in (old, new))
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            yield f"control {name} was removed"
        elif name not in before:
            yield f"control {name} was added"
        elif before[name].weights_hash != after[name].weights_hash:
            yield f"control {name} changed: {before[name].weights_hash[:12]} -> {after[name].weights_hash[:12]}"


def _reference(old: BuildInputs, new: BuildInputs) -> Iterator[str]:
    then, now = old.reference, new.reference
    if then is None or now is None:
        if then or now:
            yield f"the IP-Adapter {now.name} was added" if now else f"the IP-Adapter {then.name if then else ''} was removed"
        return
    if then.weights_hash != now.weights_hash:
        yield f"the IP-Adapter changed: {then.name} {then.weights_hash[:12]} -> {now.name} {now.weights_hash[:12]}"
    if then.encoder_hash != now.encoder_hash:
        yield f"the image encoder changed: {then.encoder} {then.encoder_hash[:12]} -> {now.encoder} {now.encoder_hash[:12]}"


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else "default" if value is None else str(value)
