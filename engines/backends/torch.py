"""torch itself, the reference that always works.

Its bundle holds a base directory with the LoRAs fused in, and each part runs as the module that other backends export.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashdiff.engines.backends.base import Backend, CompilePart
from flashdiff.engines.bundle import Manifest, PartFile, Precision
from flashdiff.engines.runtime.device import Device

if TYPE_CHECKING:
    from flashdiff.engines.parts import Part
    from flashdiff.families.base import TorchModel

MODEL = "model"
"""The base directory within a bundle."""
CONTROLS = "controls"
"""The folder of the control networks in it, by name."""
REFERENCE, ADAPTER, ENCODER_FOLDER = "reference", "ip_adapter.safetensors", "image_encoder"
"""The folder of the IP-Adapter in it, the adapter's file there, and its image encoder's folder."""


def _save(model: "TorchModel", parts: Sequence["Part"], folder: Path, precision: Precision) -> dict[str, tuple[PartFile, ...]]:
    from flashdiff.engines.parts import AtPrecision

    if precision != "fp32":
        for part in parts:
            AtPrecision(part, precision)  # casts its weights: the file need not hold what the engine will not use
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


RECORDS = (
    Backend(
        name="torch",
        extra="distill",
        modules=("torch", "transformers"),
        save=_save,
        open_parts=_open_parts,
        uses_gpu=_uses_gpu,
        lacks={
            "int8": "torch's own modules compute in floating point, and torchao's kernels are not tried; take bf16, or openvino",
            "fp8": "torch's own modules have no fp8, and torchao's kernels are not tried; take bf16",
        },
        parallel_decode_on_gpu=True,
        memory_per_bucket=False,
    ),
)
