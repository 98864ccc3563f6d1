"""The public networks, by model: their shapes, and what diffusers calls them."""

from collections.abc import Callable
from typing import Any


def _unet_sd15() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # the rest are diffusers' defaults


def _unet_sdxl() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _transformer_pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(sample_size=64, caption_channels=4096)  # PixArt-XL-2-512x512


def _transformer_sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )


NETWORKS: dict[str, tuple[str, Callable[[], Any]]] = {
    "sd15": ("unet", _unet_sd15),
    "sdxl": ("unet", _unet_sdxl),
    "pixart": ("transformer", _transformer_pixart),
    "sd3": ("transformer", _transformer_sd3),
}
"""Folder and network of each."""

PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "pixart": "PixArtAlphaPipeline",
    "sd3": "StableDiffusion3Pipeline",
}


def network_parameters(name: str) -> int:
    """The size of the public network, computed from its shapes."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NETWORKS[name][1]().parameters())
