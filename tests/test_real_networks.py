"""The denoisers of published models, of real size and without weights: how large they are, and what a LoRA of them reaches."""

import importlib
from typing import Any

import diffusers
import pytest
import torch

SD2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96, "use_linear_projection": True}
PIXART_SIGMA = {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False}
SD3: dict[str, Any] = {
    "sample_size": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "attention_head_dim": 64,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13)), "pos_embed_max_size": 384}
SD35_LARGE = {**SD3, "qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}


@pytest.mark.parametrize(
    ("family", "network", "settings", "billions", "reached"),
    [
        pytest.param("sd15", "UNet2DConditionModel", SD2, 0.8659, 0.11, id="sd2"),
        pytest.param("pixart_sigma", "PixArtTransformer2DModel", PIXART_SIGMA, 0.611, 0.999, id="pixart-sigma"),
        pytest.param("sd3", "SD3Transformer2DModel", SD3, 2.08, 0.65, id="sd3"),
        pytest.param("sd3", "SD3Transformer2DModel", SD35_MEDIUM, 2.47, 0.65, id="sd35-medium"),
        pytest.param("sd3", "SD3Transformer2DModel", SD35_LARGE, 8.15, 0.66, id="sd35-large"),
        pytest.param("flux", "FluxTransformer2DModel", {"guidance_embeds": True}, 11.9, 0.72, id="flux"),
        pytest.param("z_image", "ZImageTransformer2DModel", {}, 6.155, 0.98, id="z-image"),
    ],
)
def test_a_network_is_as_large_as_published(
    family: str, network: str, settings: dict[str, Any], billions: float, reached: float
) -> None:
    with torch.device("meta"):
        model = getattr(diffusers, network)(**settings)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    in_file = sum(tensor.numel() for tensor in model.state_dict().values())  # authors count a table of positions
    assert in_file / 1e9 == pytest.approx(billions, rel=0.004)
    targets = importlib.import_module(f"flashdiff.families.{family}").FAMILY.lora_targets
    modules = [module for name, module in model.named_modules() if any(f".{name}".endswith(f".{target}") for target in targets)]
    assert sum(module.weight.numel() for module in modules) / parameters == pytest.approx(reached, abs=0.015)
