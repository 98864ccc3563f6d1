"""Every family through the whole training program with all losses: killed, resumed, published, loaded by stock diffusers."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from recipes import tiny_recipe
from safetensors.torch import load_file
from tiny import MODELS, open_stock
from torch import Tensor

from flashdiff.distill import loop
from flashdiff.distill.loop import distill
from flashdiff.families import load_base
from flashdiff.generate import generate
from flashdiff.lora import load_fused
from flashdiff.lora_files import KOHYA, WEIGHTS
from flashdiff.tasks import check_order

pytestmark = pytest.mark.slow

ALL = {"updates": 2, "mode_weights": (1, 1, 1, 1), "adversarial": 0.1, "distribution_matching": 0.3}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_family_trains_resumes_publishes_and_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = MODELS[name](tmp_path / name)
    recipe = tiny_recipe(base, phases=[ALL], learning_rate=0.05, checkpoint_every=1, lora={"rank": 2, "alpha": 4})
    distill(recipe, tmp_path / "whole")

    learn = loop.Student.learn

    def learn_until_killed(student: loop.Student, loss: float) -> None:
        if student.update == 1:
            raise KeyboardInterrupt
        learn(student, loss)

    monkeypatch.setattr(loop.Student, "learn", learn_until_killed)
    with pytest.raises(KeyboardInterrupt):
        distill(recipe, tmp_path / "broken")
    monkeypatch.undo()
    distill(recipe, tmp_path / "broken")
    whole, broken = (load_file(tmp_path / run / WEIGHTS) for run in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)

    family, teacher = load_base(str(base))
    _, student = load_fused(str(base), [(tmp_path / "whole", 1.0)], None)
    assert student.spec.sampler.kind == "flash"
    inputs = _inputs(student)
    with torch.no_grad():
        fused, before = student.denoiser(*inputs), teacher.denoiser(*inputs)
        assert (fused - before).abs().max() > 1e-4
        torch.testing.assert_close(
            _stock(family.pipeline_class, base, tmp_path / "whole", teacher, inputs), fused, atol=1e-4, rtol=1e-4
        )
        _, converted = load_fused(str(base), [(tmp_path / "whole" / KOHYA, 1.0)], None)
        torch.testing.assert_close(converted.denoiser(*inputs), fused, atol=1e-5, rtol=1e-5)
        if family.lora_prefix == "unet":  # diffusers' loaders read kohya's names for UNets
            kohya = _stock(family.pipeline_class, base, tmp_path / "whole", teacher, inputs, weight_name=KOHYA)
            torch.testing.assert_close(kohya, fused, atol=1e-4, rtol=1e-4)
    images = [generate(model, [check_order(model.spec, prompt="a dog", steps=2)])[0][0] for model in (student, teacher)]
    assert (images[0] != images[1]).any()


def _inputs(model: Any) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *model.spec.latent_shape(model.spec.sizes[0]), generator=generator)
    conditioning = model.encode_ids(model.tokenizer(["a dog", "two cats"]))
    return latents, torch.tensor([999, 249]), *(conditioning[name] for name in model.conditioning)


def _stock(
    pipeline_class: str, base: Path, lora: Path, model: Any, inputs: tuple[Tensor, ...], weight_name: str = WEIGHTS
) -> Tensor:
    """The network's output with the LoRA loaded by diffusers' own loader, unfused."""
    pipeline = open_stock(getattr(diffusers, pipeline_class), base)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(lora, weight_name=weight_name)
        network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        if type(model.network).__name__ == "_Transformer":  # ours has another forward over the same weights
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
            model.network.load_state_dict(network.state_dict())
            network = model.network
        setattr(model.denoiser, "unet" if hasattr(pipeline, "unet") else "transformer", network)
    else:  # PixArt's pipeline has no loader; the mixin's own reads the same file
        model.network.load_lora_adapter(lora, weight_name=WEIGHTS, prefix="transformer")
    output: Tensor = model.denoiser(*inputs)
    return output
