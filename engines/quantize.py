"""The search for a rounded denoiser that passes the gate: every layer first, then all but the ones that rounding moves most."""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from flashdiff.engines.backends import find_backend
from flashdiff.engines.backends.base import Backend
from flashdiff.engines.bundle import Manifest, Quantization
from flashdiff.engines.calibration import Samples
from flashdiff.engines.reference import Reference
from flashdiff.engines.runtime.engine import Engine
from flashdiff.engines.runtime.machine import this_machine
from flashdiff.engines.verify import Findings, measure_errors
from flashdiff.errors import BundleError

KEPT_SHARES = (0.0, 0.1, 0.25, 0.5)
"""Shares of the layers that stay as they are, one a try. With half of them so, too little is gained to go on."""


def quantize_denoiser(
    manifest: Manifest, folder: Path, samples: Samples, expected: Reference, report: Callable[[str], None]
) -> tuple[Manifest, Findings]:
    """Put a rounded graph in the place of the denoiser's in `folder`; the manifest that says so, and the graphs' errors.

    Control networks steer denoisers of their own, which stay as they are. BundleError where no try passes.
    """
    backend = find_backend(manifest.backend)
    quantize, rest = backend.quantize[manifest.precision], backend.rest[manifest.precision]
    part = manifest.model.denoisers[0].name
    (record,) = manifest.parts[part].files
    graph = folder / record.file
    plain = _moved(graph)
    noise: Mapping[str, float] = {}
    flaw: str | None = None
    for tries, share in enumerate(KEPT_SHARES, 1):
        kept = _noisiest(noise, share)
        if flaw:
            report(f"{flaw}: trying again with {len(kept)} of {len(noise)} layers in {rest}")
        rounded = quantize(plain, graph, samples.rows, kept)
        noise = noise or rounded
        quantization = Quantization(part=part, rows=len(samples.rows), layers=len(rounded), kept=tuple(kept), tries=tries)
        manifest = manifest.model_copy(update={"quantization": quantization})
        try:
            findings = measure_errors(expected, Engine(folder, _tried(manifest, backend)), manifest)
            flaw = findings.flaw(manifest.model)
        except BundleError as error:  # such as values that are not finite
            flaw = str(error).removesuffix("; the bundle is not published")
            continue
        if flaw is None:
            shutil.rmtree(plain.parent)
            return manifest, findings
    raise BundleError(f"{flaw}, with half of its layers in {rest} too; the bundle is not published; take another precision")


def _tried(manifest: Manifest, backend: Backend) -> Manifest:
    """What runs the graphs: the backend itself, or on a CPU one that takes them for what they are without their rounding."""
    if not backend.tried_by:
        return manifest
    plain = {"backend": backend.tried_by, "precision": backend.rest[manifest.precision], "machine": this_machine(lambda: False)}
    return manifest.model_copy(update=plain)


def _moved(graph: Path) -> Path:
    """The graph's files in a folder of their own."""
    place = graph.parent / "plain"
    place.mkdir()
    for file in graph.parent.glob(f"{graph.stem}.*"):
        file.rename(place / file.name)
    return place / graph.name


def _noisiest(noise: Mapping[str, float], share: float) -> list[str]:
    """The share of the layers that rounding moves most, the worst one first."""
    return sorted(noise, key=lambda layer: (-noise[layer], layer))[: math.ceil(share * len(noise))]
