"""Folded networks make what the networks as diffusers runs them make, at every size."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.models.upsampling import Upsample2D
from tiny import MODELS
from torch import nn
from torch.nn.functional import interpolate

from flashdiff.engines.folding import fold_upsampling, transposed
from flashdiff.families import load_base

SIDES = [(1, 1), (1, 5), (2, 3), (7, 4), (16, 16)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), SIDES)
def test_a_transposed_convolution_is_doubling_and_a_convolution(height: int, width: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    expected = conv(interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(transposed(conv)(x), expected, rtol=0, atol=1e-14)


def _kl() -> AutoencoderKL:
    blocks = 3
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=4,
    )


def _tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )


@pytest.mark.parametrize("make", [_kl, _tiny])
@pytest.mark.parametrize(("height", "width"), SIDES)
def test_a_folded_decoder_gives_the_same_images(make: type[nn.Module], height: int, width: int) -> None:
    torch.manual_seed(0)
    decoder = make().decoder.eval().requires_grad_(False)
    folded = copy.deepcopy(decoder)
    assert fold_upsampling(folded) == 2
    x = torch.randn(2, 4, height, width)
    torch.testing.assert_close(folded(x), decoder(x), rtol=0, atol=1e-5)


def test_every_familys_decoder_is_exact_when_folded(tmp_path: Path) -> None:
    folded = {}
    for name in ("sd15", "sd3", "qwen-image", "sana"):
        _, model = load_base(str(MODELS[name](tmp_path / name)))
        latents = torch.randn(2, *model.spec.latent_shape(model.spec.sizes[0]))
        with torch.no_grad():
            expected = model.decoder(latents)
            folded[name] = fold_upsampling(model.decoder)
            torch.testing.assert_close(model.decoder(latents), expected, rtol=0, atol=1e-5)
    assert min(folded[name] for name in ("sd15", "sd3", "qwen-image")) > 0


@pytest.mark.parametrize(
    "kept",
    [
        nn.Sequential(nn.Upsample(scale_factor=4), nn.Conv2d(4, 4, 3, padding=1)),
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3, padding=1)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)),
        nn.ModuleList([Upsample2D(4, use_conv=True, norm_type="ln_norm", elementwise_affine=True)]),
        nn.ModuleList([Upsample2D(4, use_conv_transpose=True)]),
        nn.ModuleList([Upsample2D(4)]),
    ],
    ids=str,
)
def test_what_is_not_that_pair_stays(kept: nn.Module) -> None:
    before = str(kept)
    assert fold_upsampling(kept) == 0
    assert str(kept) == before
