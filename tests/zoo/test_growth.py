"""A denoiser grown from another: the same function, on which training goes on."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from flashdiff.zoo.denoiser import channel_weights, place_weights
from flashdiff.zoo.growth import grow


def _unet(layers: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 24),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=layers,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def _output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    output: torch.Tensor = unet(x, torch.tensor([3, 700]), text).sample
    return output


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (2, 4)])
@torch.no_grad()
def test_growth_keeps_the_function(before: int, after: int) -> None:
    unet = _unet(before)
    grown = grow(unet, after)
    assert grown.config.layers_per_block == after
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in unet.parameters())
    assert (_output(grown) - _output(unet)).abs().max() < 1e-5


def test_new_layers_learn() -> None:
    grown = grow(_unet(1), 2)
    _output(grown).square().mean().backward()
    new = (grown.down_blocks[0].resnets[1], grown.up_blocks[0].resnets[1], grown.up_blocks[2].resnets[1])
    assert all(resnet.conv2.weight.grad.abs().max() > 0 for resnet in new)
    assert grown.up_blocks[0].attentions[1].proj_out.weight.grad.abs().max() > 0


def test_a_network_cannot_shrink() -> None:
    with pytest.raises(ValueError, match="2 layers a block cannot grow to 1"):
        grow(_unet(2), 1)


def test_weights_of_channels_divide_by_their_variance_and_have_mean_one() -> None:
    latents = torch.randn(50, 3, 4, 4) * torch.tensor([0.1, 1, 3])[:, None, None]
    weights = channel_weights(latents)
    assert weights.shape == (3, 1, 1)
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    counted = (weights * latents).mul(latents).mean((0, 2, 3))
    assert counted.max() / counted.min() == pytest.approx(1, abs=0.01)


def test_weights_of_places_have_mean_one() -> None:
    details = torch.rand(10, 4, 4) < 0.2
    weights = place_weights(details, 8)
    assert weights.shape == (10, 1, 4, 4)
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    assert weights[:, 0][details].mean() == pytest.approx(8 * weights[:, 0][~details].mean())
    assert torch.equal(place_weights(details, 1), torch.ones(10, 1, 4, 4))
