"""torch itself, the reference that always works.

Its bundle holds a base directory with the LoRAs fused in, and each part runs as the module that other backends export. Compiled,
it holds packages of machine code and their weights instead: see `torch_compiler`.
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashdiff.engines.backends.base import REBUILD, Backend, CompilePart, check_fp8
from flashdiff.engines.bundle import BuildInputs, Machine, Manifest, PartFile, Precision
from flashdiff.engines.runtime.device import Device
from flashdiff.errors import BackendError, BundleError

if TYPE_CHECKING:
    from flashdiff.engines.parts import Part
    from flashdiff.families.base import TorchModel

MODEL = "model"
"""The base directory within a bundle."""
CONTROLS = "controls"
"""The folder of the control networks in it, by name."""
REFERENCE, ADAPTER, ENCODER_FOLDER = "reference", "ip_adapter.safetensors", "image_encoder"
"""The folder of the IP-Adapter in it, the adapter's file there, and its image encoder's folder."""
WEIGHTS = "weights.safetensors"
"""Next to the packages of a compiled part: its weights, by the packages' names for them."""
_REST: dict[Precision, Precision] = {"fp8": "bf16"}
"""Also what the weights are stored in: they are rounded when a bundle is opened."""


def _save(
    model: "TorchModel", parts: Sequence["Part"], folder: Path, inputs: BuildInputs, report: Callable[[str], None]
) -> dict[str, tuple[PartFile, ...]]:
    if inputs.compiled:
        from flashdiff.engines.backends.torch_compiler import compile_parts

        return compile_parts(model, parts, folder, inputs, report)
    from flashdiff.engines.parts import AtPrecision

    if inputs.precision != "fp32":
        for part in parts:
            # It casts the weights: the file need not hold what the engine will not use.
            AtPrecision(part, _REST.get(inputs.precision, inputs.precision))
    target = folder / MODEL
    for name, module in model.weights.items():
        module.save_pretrained(target / name, safe_serialization=True)
    for name, network in model.controls.items():
        network.save_pretrained(target / CONTROLS / name, safe_serialization=True)
    if adapter := model.ip_adapter:
        adapter.encoder.save_pretrained(target / REFERENCE / ENCODER_FOLDER, safe_serialization=True)
        shutil.copyfile(adapter.file, target / REFERENCE / ADAPTER)
    for file in (*model.folder.glob("*.json"), *model.folder.glob("*/*")):  # configurations and vocabularies are the base's own
        is_wanted = file.suffix in (".json", ".txt", ".model") and not file.name.endswith(".index.json")
        if is_wanted and file.parent.name not in model.replaced:
            (target / file.relative_to(model.folder).parent).mkdir(exist_ok=True)
            shutil.copyfile(file, target / file.relative_to(model.folder))
    return {part.name: (PartFile(file=f"{MODEL}/model_index.json"),) for part in parts}


def _open_parts(folder: Path, manifest: Manifest, device: Device) -> CompilePart:
    from flashdiff.engines.backends.torch_runner import open_parts

    return open_parts(folder, manifest, device)


def _uses_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _check_compile(precision: Precision) -> None:
    if precision == "fp8":
        raise BackendError("--compile: it was never tried in fp8; take bf16, or leave it out")
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # its own class of error, and whatever a broken compiler gives
        tried = config.cpp.cxx[-1]  # $CXX, or the system's usual one
        raise BackendError(
            f"--compile needs a C++ compiler, and '{tried}' is not one: install g++, set $CXX, or leave it out"
        ) from None


def _check_precision(precision: Precision, here: Machine) -> None:
    if precision == "fp8":
        check_fp8(here)


def _check_bundle(manifest: Manifest, here: Machine) -> None:
    if not manifest.compiled:
        return
    made = manifest.machine
    if made.system != here.system:
        raise BundleError(f"the bundle was compiled for {made.system}, this is {here.system}; {REBUILD}")
    if made.device == "cuda" and made.features != here.features:
        raise BundleError(f"the bundle was compiled for a GPU of {made.features[0]}, this one is {here.features[0]}; {REBUILD}")
    if absent := [name for name in made.features if name not in here.features]:
        raise BundleError(f"the bundle was compiled for a CPU with {absent[0]} ({made.processor}), this one lacks it; {REBUILD}")
    then, now = manifest.library_versions.get("torch"), importlib.metadata.version("torch")
    if then != now:
        raise BundleError(f"the bundle was compiled by torch {then}, here is {now}; install that version, or {REBUILD}")


RECORDS = (
    Backend(
        name="torch",
        extra="distill",
        modules=("torch", "transformers"),
        save=_save,
        open_parts=_open_parts,
        uses_gpu=_uses_gpu,
        check_precision=_check_precision,
        check_compile=_check_compile,
        check_bundle=_check_bundle,
        lacks={
            "int8": "torch's own products of int8 have no scales, and torchao's kernels are not tried; take bf16, or openvino"
        },
        rest=_REST,
        weight_bytes={"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 2},
        parallel_decode_on_gpu=True,
        memory_per_bucket=False,
    ),
)
