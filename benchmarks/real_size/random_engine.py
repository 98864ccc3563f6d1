"""Engines of the torch backend with random weights, which are made on the device from a base's configurations."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flashdiff.components import ModelSpec
from flashdiff.engines.backends import find_backend
from flashdiff.engines.bundle import Manifest, PartFile, PartRecord, Precision, tokenizer_file
from flashdiff.engines.runtime.engine import Engine
from flashdiff.files import write_whole
from flashdiff.sampling import Sampler
from flashdiff.schedule import Grid

GUIDANCE = 5.0


def student_spec(teacher: ModelSpec) -> ModelSpec:
    """The same network with a flash student's sampler."""
    sampler = Sampler(kind="flash", schedule=teacher.sampler.schedule, grid=Grid(solver_steps=32), default_steps=4)
    return teacher.model_copy(update={"sampler": sampler})


@contextmanager
def random_weights(base: Path, device: str) -> Iterator[None]:
    """Within the context, the base's parts are made on the device from their configurations, initialised by their libraries."""
    import torch

    from flashdiff.families import family_of

    def make(folder: Path, part: str, kind: Any) -> Any:
        with torch.device(device):
            if hasattr(kind, "from_config"):
                model = kind.from_config(kind.load_config(folder / part))
            else:
                model = kind(kind.config_class.from_pretrained(folder / part))
        return model.eval().requires_grad_(False)

    with patch.object(sys.modules[family_of(base).load.__module__], "load_part", make):
        yield


def open_random_teacher(base: Path, precision: Precision, batches: Sequence[int]) -> Engine:
    """The guided engine of a base without weights, as if its bundle were opened."""
    from flashdiff.engines.backends.torch import MODEL
    from flashdiff.engines.parts import parts_of
    from flashdiff.families import load_base

    machine = find_backend("torch").machine()
    with random_weights(base, machine.device):
        family, model = load_base(str(base))
        parts = parts_of(family, model)
        for tokenizer in model.spec.tokenizers:
            write_whole(base.parent / tokenizer_file(tokenizer), model.tokenizer.texts[tokenizer.name])
        spec = model.spec.model_copy(
            update={"sampler": Sampler.model_validate({**model.spec.sampler.model_dump(), "guidance": GUIDANCE})}
        )
        if not (base.parent / MODEL).exists():
            (base.parent / MODEL).symlink_to(base)
        specs = {part.name: PartRecord(files=(PartFile(file=MODEL),), inputs=part.inputs, outputs=part.outputs) for part in parts}
        del family, model, parts
        # The manifest is never written, so it has only the fields that an engine reads.
        fields: dict[str, Any] = {"model": spec, "backend": "torch", "precision": precision, "machine": machine, "parts": specs}
        return Engine(base.parent, Manifest.model_construct(**fields, batch_sizes=tuple(batches), sizes=spec.sizes))
