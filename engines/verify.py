"""Verification before publishing: every compiled part and a whole image are compared with torch in float32."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdiff.components import ModelSpec
from flashdiff.engines.backends import find_backend
from flashdiff.engines.bundle import Manifest, Precision, at_scale_0, replaced_by
from flashdiff.engines.reference import Case, Outputs, Reference, sample_image
from flashdiff.engines.runtime.engine import Engine
from flashdiff.errors import BundleError

PART_ERROR: dict[Precision, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-1, "int8": 3.0, "fp8": 3.0}
"""Largest difference of a part's output to torch that is allowed, in units of that output's root mean square (at least 1)."""
IMAGE_ERROR: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2, "int8": 6e-2, "fp8": 6e-2}
"""Largest root mean square difference of a whole image in [-1, 1]: 0.005 is 52 dB, 0.03 is 36 dB, 0.06 is 30 dB."""


@dataclass(frozen=True)
class Findings:
    """What was measured of a bundle."""

    errors: dict[str, float]
    """By part, for `image`, and for `at_scale_0` of the parts that replace others and of a denoiser that reads a reference."""
    allowed: dict[str, float]
    rows_are_exact: bool

    def flaw(self, spec: ModelSpec) -> str | None:
        """The first error that is too large, in words; `spec` is the model's."""
        for name, error in self.errors.items():
            if not error <= self.allowed[name]:
                other = replaced_by(spec, name)
                place = f"the bundle's own {other}" if other else "torch"
                return f"{name} differs from {place} by {error:.2e}, more than {self.allowed[name]:.0e}"
        return None


def verify(expected: Reference, engine: Engine) -> Findings:
    """`measure_errors`; BundleError also for an error that is too large."""
    findings = measure_errors(expected, engine)
    if flaw := findings.flaw(engine.spec):
        raise BundleError(f"{flaw}; the bundle is not published")
    return findings


def measure_errors(expected: Reference, engine: Engine, manifest: Manifest | None = None) -> Findings:
    """Compare with torch at every batch size and image size; BundleError where a bundle is wrong whatever its errors.

    `manifest` is that of the bundle, where the engine only stands in for it.
    Values must be finite and of the type asked for, identical rows must stay identical, and in float32 on a CPU a row must
    not depend, bit for bit, on its batch.
    """
    manifest = manifest or engine.manifest
    precision, backend = manifest.precision, find_backend(manifest.backend)
    must_be_exact = backend.exact_rows_on_cpu and manifest.machine.device == "cpu" and precision == "fp32"
    allowed = {part: PART_ERROR[backend.precision_of(manifest, part)] for part in manifest.parts}
    allowed["image"] = IMAGE_ERROR[precision]
    errors, are_exact = dict.fromkeys(manifest.parts, 0.0), True
    for case in expected.cases:
        error, is_exact = _check_case(case, engine, allowed[case.part])
        errors[case.part] = max(errors[case.part], error)
        if must_be_exact and not is_exact:
            raise BundleError(f"{case.part}: a row changes with its batch; the bundle is not published")
        are_exact = are_exact and is_exact
    for case in expected.plain:
        name = at_scale_0(case.part)
        errors[name] = max(errors.get(name, 0.0), difference(engine.call(case.part, _unread(case)), case.outputs))
        allowed[name] = PART_ERROR[precision]
    for part in engine.spec.replacements:
        name = at_scale_0(part.name)
        errors[name] = max(_off_at_zero(case, engine) for case in expected.cases if case.part == part.name)
        allowed[name] = PART_ERROR[precision]  # of a quantized bundle that of the part that it replaces
    errors["image"] = max(
        float(np.sqrt(np.mean(np.square(image - sample_image(engine, engine.spec, size)))))
        for size, image in expected.images.items()
    )
    return Findings(errors, allowed, are_exact)


def _unread(case: Case) -> dict[str, NDArray[Any]]:
    """The inputs of a denoiser, with the reference at scale 0."""
    zeros = {name: np.zeros_like(values) for name, values in case.inputs.items() if name.startswith("scale_of_")}
    return {**case.inputs, **zeros}


def _off_at_zero(case: Case, engine: Engine) -> float:
    """How far a part whose control networks and LoRAs have the scale 0 is from the one that it replaces."""
    spec = engine.spec
    usual = spec.part(spec.part(case.part).replaces or "")
    added = [c for c in spec.taken_by(case.part) if c.scaled and c.scale_name not in usual.inputs]
    zeros = {c.scale_name: np.zeros(case.batch, dtype=np.float32) for c in added}
    plain = engine.call(usual.name, {name: case.inputs[name] for name in usual.inputs})
    return difference(engine.call(case.part, {**case.inputs, **zeros}), plain)


def _check_case(case: Case, engine: Engine, allowed: float) -> tuple[float, bool]:
    """The error of a part at one bucket, and whether its rows are exact."""
    got = engine.call(case.part, case.inputs)
    _check_kind(case, got)
    last = {name: values[-1:] for name, values in case.inputs.items()}
    alone = engine.call(case.part, last)
    repeated = engine.call(case.part, {name: np.repeat(values, case.batch, axis=0) for name, values in last.items()})
    _check_repeated(case, repeated, allowed)
    first = {name: np.broadcast_to(values[:1], values.shape) for name, values in repeated.items()}
    is_exact = _equal({name: values[-1:] for name, values in got.items()}, alone) and _equal(repeated, first)
    return difference(got, case.outputs), is_exact


def difference(got: Outputs, expected: Outputs) -> float:
    """Largest difference over the outputs, each in units of its root mean square where that is above 1."""

    def of(name: str) -> float:
        scale = max(1.0, float(np.sqrt(np.mean(np.square(expected[name], dtype=np.float64)))))
        return float(np.abs(got[name] - expected[name]).max()) / scale

    return max(map(of, expected))


def _check_kind(case: Case, got: Outputs) -> None:
    where = f"batch {case.batch}, {case.size}"
    for name, wanted in case.outputs.items():
        values = got[name]
        if values.shape != wanted.shape or values.dtype != wanted.dtype:
            found, right = (f"{array.dtype} {list(array.shape)}" for array in (values, wanted))
            raise BundleError(f"{case.part} returned {found} as {name}, not {right}, at {where}")
        if not np.isfinite(values).all():
            raise BundleError(f"{case.part} returned values that are not finite at {where}; the bundle is not published")


def _check_repeated(case: Case, repeated: Outputs, allowed: float) -> None:
    """NVIDIA/TensorRT#4813 and its like: identical rows of one batch that come out different."""
    spread = difference(repeated, {name: np.broadcast_to(values[:1], values.shape) for name, values in repeated.items()})
    if not spread <= allowed:
        where = f"batch {case.batch}, {case.size}"
        raise BundleError(f"{case.part}: identical rows differ by {spread:.2e} at {where}; the bundle is not published")


def _equal(one: Outputs, other: Outputs) -> bool:
    return all(np.array_equal(values, other[name]) for name, values in one.items())
