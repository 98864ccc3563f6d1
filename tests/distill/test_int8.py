"""A frozen base in 8 bits: what it keeps, how near it is, and a LoRA that trains on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import killed_at, tiny_recipe
from safetensors.torch import load_file
from tiny import FAMILIES
from torch import nn
from torch.nn.functional import linear

from flashdiff.distill import loop, processes
from flashdiff.distill.dry_run import dry_run
from flashdiff.distill.int8 import Int8Linear, round_to_int8
from flashdiff.distill.loop import distill
from flashdiff.distill.student import Student
from flashdiff.errors import ConfigError
from flashdiff.families import load_base
from flashdiff.lora import load_fused
from flashdiff.lora_files import WEIGHTS

ALL = {"updates": 2, "mode_weights": (1, 1, 1, 1), "adversarial": 0.1, "distribution_matching": 0.3, "backward_simulation": 0.5}


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_is_its_rounded_weights_and_keeps_no_others(has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 24, bias=has_bias)
    with torch.no_grad():
        layer.weight[3] = 0.0
        layer.weight[5] *= 100
    rounded = Int8Linear(layer)
    weight = rounded.weight * rounded.scale
    assert ((weight - layer.weight).abs() <= rounded.scale * 0.5001).all()
    assert rounded.weight.abs().amax(dim=1).tolist() == [0 if row == 3 else 127 for row in range(24)]
    x = torch.randn(2, 5, 16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda values: (kept.append(values), values)[1], lambda values: values):
        found = rounded(x)
    assert [values.dtype for values in kept if values.numel() >= layer.weight.numel()] == [torch.int8]
    wanted = linear(x, weight, layer.bias)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(found)
    (own,), (exact,) = (torch.autograd.grad(values, x, upstream) for values in (found, wanted))
    torch.testing.assert_close(own, exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert rounded(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name", [name if name in ("sd15", "flux") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_familys_network_in_8_bits_is_near_its_own(name: str, tmp_path: Path) -> None:
    _, model = load_base(str(FAMILIES[name](tmp_path / name)))
    latents = torch.randn(2, *model.spec.latent_shape(model.spec.sizes[0]), generator=torch.Generator().manual_seed(0))
    conditioning = model.encode_ids(model.tokenizer(["a dog", "two cats"]))
    inputs = (latents, torch.tensor([999, 249]), *(conditioning[name] for name in model.conditioning))
    with torch.no_grad():
        before = model.denoiser(*inputs)
        round_to_int8(model.network)
        error = (model.denoiser(*inputs) - before).norm() / before.norm()
    assert 0 < error < 0.03
    inside = [p for p in model.network.parameters() if p.dtype == torch.int8]
    assert sum(p.numel() for p in inside) > 0.1 * sum(p.numel() for p in model.network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_lora_trains_on_8_bits_resumes_and_fits_the_base(
    precision: torch.dtype, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "precision", lambda: precision)
    loss = {"distribution_matching": {"fake_score": "lora", "critic_updates": 1}, "distillation": "perceptual"}
    changes: dict[str, Any] = {"phases": [ALL], "loss": loss, "checkpoint_every": 1, "gradient_checkpointing": True}
    recipe = tiny_recipe(tiny_base, int8_base=True, **changes)
    distill(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Student, "learn", killed_at(1, Student.learn))
        with pytest.raises(KeyboardInterrupt):
            distill(recipe, tmp_path / "broken")
    distill(recipe, tmp_path / "broken")
    whole, broken = (load_file(tmp_path / run / WEIGHTS) for run in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    distill(tiny_recipe(tiny_base, **changes), tmp_path / "float")
    plain = load_file(tmp_path / "float" / WEIGHTS)
    assert whole.keys() == plain.keys()
    assert any(not torch.equal(whole[key], plain[key]) for key in whole)
    load_fused(str(tiny_base), [(tmp_path / "whole", 1.0)], None)


def test_8_bits_are_refused_where_weights_are_read(tiny_base: Path) -> None:
    plain = tiny_recipe(tiny_base)
    assert tiny_recipe(tiny_base, int8_base=False).content_hash == plain.content_hash
    for changes, named in (
        ({"student": "full", "lora": None}, "student = 'full'"),
        ({"shard_base": True}, "shard_base"),
        ({"lora": {"rank": 1, "alpha": 1, "dora": True}}, "lora.dora"),
    ):
        with pytest.raises(ValueError, match=f"int8_base does not go together with {named}"):
            tiny_recipe(tiny_base, int8_base=True, **changes)
    with pytest.raises(ConfigError, match="int8_base: this network has no blocks of linear layers"):
        round_to_int8(_NoBlocks())


class _NoBlocks(nn.Module):
    _no_split_modules = None


def test_a_dry_run_counts_int8(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashdiff.distill.dry_run._GIB", 1)  # the tiny model's bytes show
    network = load_base(str(tiny_base))[1].network
    round_to_int8(network)
    rounded = sum(p.numel() for p in network.parameters() if p.dtype == torch.int8)
    said = ("memory   in float32 ", "memory   in float32, int8 in the base's blocks: ")
    bytes_taken = [
        float(line.removeprefix(start).split()[0])
        for is_rounded, start in zip((False, True), said, strict=True)
        for line in dry_run(tiny_recipe(tiny_base, int8_base=is_rounded))
        if line.startswith(start)
    ]
    assert bytes_taken[0] - bytes_taken[1] == 3 * rounded > 0
