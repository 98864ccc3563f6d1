"""The public denoisers, by model: their settings, how large they are published to be, and with how few layers they still work."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class PublicNetwork:
    """A published model's denoiser, as diffusers configures it."""

    family: str
    """The family's module in flashdiff.families."""
    pipeline: str
    kind: str
    """The network's class in diffusers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Those that differ from the defaults of the class."""
    few_layers: Mapping[str, Any]
    """The settings that leave one or two blocks of every sort, of the full width."""
    layers: str
    """In words: the blocks that `few_layers` leaves, of all."""
    published: str
    """The number of parameters that its authors publish."""
    source: str
    """Where they do."""

    @property
    def folder(self) -> str:
        """The denoiser's folder in a base."""
        return "unet" if self.kind == "UNet2DConditionModel" else "transformer"

    def make(self, *, is_cut: bool = False) -> Any:
        """The network, or the one of few layers, initialised by diffusers."""
        import diffusers

        return getattr(diffusers, self.kind)(**{**self.settings, **(self.few_layers if is_cut else {})})

    def parameters(self, *, is_cut: bool = False) -> int:
        """How many values its weights have, computed from their shapes."""
        import torch

        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.make(is_cut=is_cut).parameters())


_SDXL_PAPER = "arXiv 2307.01952, table 1"
_UNET_LAYERS = "1 of 2 a level"
_SD3: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
_PIXART = {"caption_channels": 4096}
_SPRINT = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
_SANA_600M = {
    "num_layers": 28,
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
_KLEIN = {"guidance_embeds": False}


def _flux(name: str, *, guidance_embeds: bool) -> PublicNetwork:
    return PublicNetwork(
        family="flux",
        pipeline="FluxPipeline",
        kind="FluxTransformer2DModel",
        settings={"guidance_embeds": guidance_embeds},
        few_layers={"num_layers": 1, "num_single_layers": 1},
        layers="1 of 19, 1 of 38",
        published="12B",
        source=f"card of FLUX.1-{name}",
    )


def _sana(name: str, published: str, source: str, layers: int, **settings: Any) -> PublicNetwork:
    is_sprint = "guidance_embeds" in settings
    return PublicNetwork(
        family="sana_sprint" if is_sprint else "sana",
        pipeline="SanaSprintPipeline" if is_sprint else "SanaPipeline",
        kind="SanaTransformer2DModel",
        settings=settings,
        few_layers={"num_layers": 2},
        layers=f"2 of {layers}",
        published=published,
        source=source,
    )


NETWORKS: dict[str, PublicNetwork] = {
    "sd15": PublicNetwork(
        family="sd15",
        pipeline="StableDiffusionPipeline",
        kind="UNet2DConditionModel",
        settings={"sample_size": 64, "cross_attention_dim": 768},
        few_layers={"layers_per_block": 1},
        layers=_UNET_LAYERS,
        published="860M",
        source=_SDXL_PAPER,
    ),
    "sd2": PublicNetwork(
        family="sd15",
        pipeline="StableDiffusionPipeline",
        kind="UNet2DConditionModel",
        settings={
            "sample_size": 96,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        few_layers={"layers_per_block": 1},
        layers=_UNET_LAYERS,
        published="865M",
        source=_SDXL_PAPER,
    ),
    "sdxl": PublicNetwork(
        family="sdxl",
        pipeline="StableDiffusionXLPipeline",
        kind="UNet2DConditionModel",
        settings={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        few_layers={"layers_per_block": 1, "transformer_layers_per_block": (1, 1, 1)},
        layers=f"{_UNET_LAYERS}, 1 of 2 and of 10",
        published="2.6B",
        source=_SDXL_PAPER,
    ),
    "pixart": PublicNetwork(
        family="pixart",
        pipeline="PixArtAlphaPipeline",
        kind="PixArtTransformer2DModel",
        settings={**_PIXART, "sample_size": 64},
        few_layers={"num_layers": 2},
        layers="2 of 28",
        published="0.6B",
        source="arXiv 2310.00426",
    ),
    "pixart-sigma": PublicNetwork(
        family="pixart_sigma",
        pipeline="PixArtSigmaPipeline",
        kind="PixArtTransformer2DModel",
        settings={**_PIXART, "sample_size": 128, "use_additional_conditions": False},
        few_layers={"num_layers": 2},
        layers="2 of 28",
        published="0.6B",
        source="arXiv 2403.04692",
    ),
    "sd3": PublicNetwork(
        family="sd3",
        pipeline="StableDiffusion3Pipeline",
        kind="SD3Transformer2DModel",
        settings=_SD3,
        few_layers={"num_layers": 2},
        layers="2 of 24",
        published="2B",
        source="arXiv 2403.03206",
    ),
    "sd35-medium": PublicNetwork(
        family="sd3",
        pipeline="StableDiffusion3Pipeline",
        kind="SD3Transformer2DModel",
        settings={**_SD3, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384},
        few_layers={"num_layers": 3, "dual_attention_layers": (0,)},
        layers="1 of 13, 2 of 11",
        published="2.5B",
        source="Stability AI's announcement, October 2024",
    ),
    "sd35-large": PublicNetwork(
        family="sd3",
        pipeline="StableDiffusion3Pipeline",
        kind="SD3Transformer2DModel",
        settings={**_SD3, "qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432},
        few_layers={"num_layers": 2},
        layers="2 of 38",
        published="8.1B",
        source="Stability AI's announcement, October 2024",
    ),
    "flux-dev": _flux("dev", guidance_embeds=True),
    "flux-schnell": _flux("schnell", guidance_embeds=False),
    "z-image": PublicNetwork(
        family="z_image",
        pipeline="ZImagePipeline",
        kind="ZImageTransformer2DModel",
        few_layers={"n_layers": 1, "n_refiner_layers": 1},
        layers="1 of 30, 1 of 2, 1 of 2",
        published="6B",
        source="card of Z-Image-Turbo",
    ),
    "sana-600m": _sana("600m", "590M", "arXiv 2410.10629, appendix", 28, **_SANA_600M),
    "sana-1600m": _sana("1600m", "1604M", "arXiv 2410.10629, appendix", 20),
    "sana-4800m": _sana("4800m", "4.8B", "arXiv 2501.18427", 60, num_layers=60, qk_norm="rms_norm_across_heads"),
    "sana-sprint-600m": _sana("sprint", "0.6B", "arXiv 2503.09641", 28, **_SANA_600M, **_SPRINT),
    "sana-sprint-1600m": _sana("sprint", "1.6B", "arXiv 2503.09641", 20, **_SPRINT),
    "qwen-image": PublicNetwork(
        family="qwen_image",
        pipeline="QwenImagePipeline",
        kind="QwenImageTransformer2DModel",
        few_layers={"num_layers": 1},
        layers="1 of 60",
        published="20B",
        source="arXiv 2508.02324",
    ),
    "flux2-klein-4b": PublicNetwork(
        family="flux2_klein",
        pipeline="Flux2KleinPipeline",
        kind="Flux2Transformer2DModel",
        settings={**_KLEIN, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        few_layers={"num_layers": 1, "num_single_layers": 1},
        layers="1 of 5, 1 of 20",
        published="4B",
        source="card of FLUX.2-klein-4B",
    ),
    "flux2-klein-9b": PublicNetwork(
        family="flux2_klein",
        pipeline="Flux2KleinPipeline",
        kind="Flux2Transformer2DModel",
        settings={**_KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        few_layers={"num_layers": 1, "num_single_layers": 1},
        layers="1 of 8, 1 of 24",
        published="9B",
        source="card of FLUX.2-klein-9B",
    ),
}
