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

SANA_600M = {
    "num_attention_heads": 36, "num_layers": 28, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}  # fmt: skip
SANA_SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
KLEIN_4B = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
KLEIN_9B = {
    "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False,
}  # fmt: skip


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
        pytest.param("sana", "SanaTransformer2DModel", SANA_600M, 0.59, 0.99, id="sana-600m"),
        pytest.param("sana", "SanaTransformer2DModel", {}, 1.604, 0.99, id="sana-1600m"),
        pytest.param("sana_sprint", "SanaTransformer2DModel", SANA_SPRINT, 1.61, 0.99, id="sana-sprint"),
        pytest.param("qwen_image", "QwenImageTransformer2DModel", {}, 20.43, 0.66, id="qwen-image"),
        pytest.param("flux2_klein", "Flux2Transformer2DModel", KLEIN_4B, 3.876, 0.95, id="flux2-klein-4b"),
        pytest.param("flux2_klein", "Flux2Transformer2DModel", KLEIN_9B, 9.079, 0.95, id="flux2-klein-9b"),
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
