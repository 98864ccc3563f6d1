"""Tiny random models, one a family: real members, made in a second, good for nothing but code paths."""

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

_TOKENS = 16
_WIDTH = 32
IMAGE_SIDE = 16
"""Pixels of each side that the tiny image encoder reads."""
_IMAGE_WIDTH, _IMAGE_EMBEDDING = 32, 24


def make_tiny_sd15(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0, **unet: Any) -> Path:
    """Write the directory: 32x32 pixels, 4x8x8 latents, a prompt of 16 tokens; `unet` are settings of the UNet."""
    torch.manual_seed(seed)
    StableDiffusionPipeline(
        vae=_vae(4),
        unet=_unet(**unet),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=_clip_tokenizer(),
        scheduler=_diffusion_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_tiny_sd2(folder: Path) -> Path:
    """As Stable Diffusion 2.x in 768: OpenCLIP's activation and padding, linear projections, heads of one width, velocities."""
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=_vae(4),
        unet=_unet(use_linear_projection=True, attention_head_dim=(2, 4)),
        text_encoder=CLIPTextModel(_clip_config(hidden_act="gelu")),
        tokenizer=_clip_tokenizer(pad_token="!"),
        scheduler=_diffusion_scheduler("v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_tiny_upscaler(folder: Path, **unet: Any) -> Path:
    """As the x4 upscaler: 4 + 3 channels, a class a noise level, velocities; 8x8 pixels become 32x32."""
    torch.manual_seed(0)
    StableDiffusionUpscalePipeline(
        vae=_vae(4, scaling_factor=0.08333),
        unet=_unet(**{"in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": (True, False), **unet}),
        text_encoder=CLIPTextModel(_clip_config(hidden_act="gelu")),
        tokenizer=_clip_tokenizer(pad_token="!"),
        low_res_scheduler=DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear"),
        scheduler=_diffusion_scheduler("v_prediction"),
    ).save_pretrained(folder)
    return folder


def make_tiny_sdxl(folder: Path, **unet: Any) -> Path:
    torch.manual_seed(0)
    StableDiffusionXLPipeline(
        vae=_vae(4),
        unet=_unet(
            cross_attention_dim=2 * _WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + _WIDTH,
            **unet,
        ),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(pad_token="!"),
        scheduler=_diffusion_scheduler("epsilon"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def make_tiny_controlnet(folder: Path, base: Path, seed: int = 0, **changes: Any) -> Path:
    """As it would be after training: none of its outputs is 0."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16, 32), **changes)
    outputs = (network.controlnet_down_blocks, network.controlnet_mid_block, network.controlnet_cond_embedding.conv_out)
    for parameter in (parameter for module in outputs for parameter in module.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return folder


def make_tiny_flux_controlnet(folder: Path, seed: int = 3) -> Path:
    """As it would be after training: none of its outputs is 0."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers warns about its own code
        network = FluxControlNetModel(
            in_channels=64, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), num_layers=2,
            num_single_layers=1, guidance_embeds=True, attention_head_dim=16, num_attention_heads=2,
        )  # fmt: skip
    for name, module in network.named_modules():
        if name.startswith("controlnet_"):
            for parameter in module.parameters(recurse=False):
                torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(folder)
    return folder


def make_tiny_image_encoder(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(7)
    settings = {
        "hidden_size": _IMAGE_WIDTH,
        "projection_dim": _IMAGE_EMBEDDING,
        "image_size": IMAGE_SIDE,
        "patch_size": 8,
        **changes,
    }
    config = CLIPVisionConfig(intermediate_size=37, num_hidden_layers=3, num_attention_heads=4, **settings)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def make_tiny_ip_adapter(file: Path, base: Path, *, plus: bool = False, seed: int = 5) -> Path:
    """As published, with the image encoder next to it; the values are so large that a reference shows."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    width = unet.config.cross_attention_dim
    shapes = _resampler(width) if plus else {
        "proj.weight": (4 * width, _IMAGE_EMBEDDING), "proj.bias": (4 * width,), "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    tensors = {f"image_proj.{name}": torch.randn(shape) / (shape[-1] ** 0.5) for name, shape in shapes.items()}
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(names):
        rows, columns = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for which in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{1 + 2 * index}.{which}.weight"] = torch.randn(rows, columns) / columns**0.5
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, file)
    if not (file.parent / "image_encoder").exists():
        make_tiny_image_encoder(file.parent / "image_encoder")
    return file


def make_tiny_flux_ip_adapter(file: Path, base: Path, *, tokens: int = 4, seed: int = 5) -> Path:
    """As XLabs names its tensors, with the image encoder next to it; the values are so large that a reference shows."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel.from_pretrained(base / "transformer")
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    shapes: dict[str, tuple[int, ...]] = {
        "proj.weight": (tokens * width, _IMAGE_EMBEDDING), "proj.bias": (tokens * width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    tensors = {f"ip_adapter_proj_model.{name}": torch.randn(shape) / (shape[-1] ** 0.5) for name, shape in shapes.items()}
    for index in range(len(transformer.transformer_blocks)):
        for which in "kv":
            name = f"double_blocks.{index}.processor.ip_adapter_double_stream_{which}_proj"
            tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.randn(inner, width), torch.randn(inner)
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, file)
    if not (file.parent / "image_encoder").exists():
        make_tiny_image_encoder(file.parent / "image_encoder")
    return file


def _resampler(width: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a Resampler with 6 tokens."""
    inner, heads = 64, 128
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (1, 6, inner), "proj_in.weight": (inner, _IMAGE_WIDTH), "proj_in.bias": (inner,),
        "proj_out.weight": (width, inner), "proj_out.bias": (width,), "norm_out.weight": (width,), "norm_out.bias": (width,),
    }  # fmt: skip
    for layer in range(4):
        shapes |= {
            **{f"layers.{layer}.0.{norm}.{kind}": (inner,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")},
            f"layers.{layer}.0.to_q.weight": (heads, inner), f"layers.{layer}.0.to_kv.weight": (2 * heads, inner),
            f"layers.{layer}.0.to_out.weight": (inner, heads), f"layers.{layer}.1.0.weight": (inner,),
            f"layers.{layer}.1.0.bias": (inner,), f"layers.{layer}.1.1.weight": (4 * inner, inner),
            f"layers.{layer}.1.3.weight": (inner, 4 * inner),
        }  # fmt: skip
    return shapes


def make_tiny_pixart(folder: Path, pipeline: Any = PixArtAlphaPipeline) -> Path:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, cross_attention_dim=32, sample_size=8, caption_channels=_WIDTH
    )
    pipeline(
        vae=_vae(4),
        transformer=_varied(transformer),
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
        scheduler=_diffusion_scheduler("epsilon"),
    ).save_pretrained(folder)
    return folder


def make_tiny_pixart_sigma(folder: Path) -> Path:
    return make_tiny_pixart(folder, PixArtSigmaPipeline)


def make_tiny_sd3(folder: Path, *, has_t5: bool = True, **settings: Any) -> Path:
    """`settings` are those of the transformer."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=16, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=80,
        caption_projection_dim=32, pooled_projection_dim=2 * _WIDTH, pos_embed_max_size=16, **{"num_layers": 2, **settings},
    )  # fmt: skip
    StableDiffusion3Pipeline(
        vae=_vae(16, shift_factor=0.1),
        transformer=_varied(transformer),
        text_encoder=CLIPTextModelWithProjection(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        text_encoder_3=_t5(width=80) if has_t5 else None,
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(pad_token="!"),
        tokenizer_3=_t5_tokenizer() if has_t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def make_tiny_sd35(folder: Path) -> Path:
    """As Stable Diffusion 3.5 medium: normalised queries and keys, blocks with a second attention; and no T5."""
    return make_tiny_sd3(folder, has_t5=False, qk_norm="rms_norm", dual_attention_layers=(0,))


def make_tiny_flux(
    folder: Path, *, guidance_embeds: bool = True, pipeline: Any = FluxPipeline, text_width: int = _WIDTH, **settings: Any
) -> Path:
    """`settings` are those of the transformer."""
    torch.manual_seed(0)
    changes = {"in_channels": 64, "num_layers": 2, "num_single_layers": 1, **settings}
    transformer = FluxTransformer2DModel(
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=text_width, pooled_projection_dim=_WIDTH,
        guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6), **changes,
    )  # fmt: skip
    pipeline(
        vae=_vae(16, shift_factor=0.1),
        transformer=_varied(transformer),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=_t5(text_width),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    ).save_pretrained(folder)
    return folder


def make_tiny_flux_fill(folder: Path, **settings: Any) -> Path:
    """A token holds 4 cells of latents, of masked latents, and of a mask of 4x4 pixels a cell."""
    return make_tiny_flux(folder, pipeline=FluxFillPipeline, in_channels=4 * (16 + 16 + 16), out_channels=64, **settings)


def make_tiny_flux_kontext(folder: Path, **settings: Any) -> Path:
    return make_tiny_flux(folder, pipeline=FluxKontextPipeline, **settings)


def make_tiny_z_image(folder: Path) -> Path:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=_WIDTH, axes_dims=[4, 6, 6]
    )
    ZImagePipeline(
        vae=_vae(16, shift_factor=0.1),
        transformer=_varied(transformer),
        text_encoder=_qwen(),
        tokenizer=_qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def make_tiny_sana(folder: Path, **settings: Any) -> Path:
    """`settings` are those of the transformer."""
    torch.manual_seed(0)
    SanaPipeline(
        vae=_dc(),
        transformer=_sana_transformer(**settings),
        text_encoder=_gemma(),
        tokenizer=_gemma_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(folder)
    return folder


def make_tiny_sana_4k(folder: Path) -> Path:
    """As Sana for 2K and 4K: with sinusoids of the places."""
    return make_tiny_sana(folder, interpolation_scale=2.0)


def make_tiny_sana_sprint(folder: Path) -> Path:
    torch.manual_seed(0)
    SanaSprintPipeline(
        vae=_dc(),
        transformer=_sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        text_encoder=_gemma(),
        tokenizer=_gemma_tokenizer(),
        scheduler=SCMScheduler(),
    ).save_pretrained(folder)
    return folder


def make_tiny_qwen_image(folder: Path) -> Path:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True])
    QwenImagePipeline(
        vae=vae,
        transformer=_varied(transformer),
        text_encoder=_qwen_vl(),
        tokenizer=_qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
    ).save_pretrained(folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps({**config, "sample_size": 32}))
    return folder


def make_tiny_flux2_klein(folder: Path, *, is_distilled: bool = False) -> Path:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    Flux2KleinPipeline(
        vae=vae,
        transformer=_varied(transformer),
        text_encoder=_deep_qwen(),
        tokenizer=_qwen_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        is_distilled=is_distilled,
    ).save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd15": make_tiny_sd15,
    "sdxl": make_tiny_sdxl,
    "pixart": make_tiny_pixart,
    "pixart-sigma": make_tiny_pixart_sigma,
    "sd3": make_tiny_sd3,
    "flux": make_tiny_flux,
    "z-image": make_tiny_z_image,
    "sana": make_tiny_sana,
    "qwen-image": make_tiny_qwen_image,
    "flux2-klein": make_tiny_flux2_klein,
}
"""By the family's name."""

MEMBERS: dict[str, str] = {"sd2": "sd15", "sd35": "sd3", "sana-4k": "sana"}
"""Models of another form that are members of these families: the family of each."""

MODELS: dict[str, Callable[[Path], Path]] = {
    **FAMILIES,
    "sd2": make_tiny_sd2,
    "sd35": make_tiny_sd35,
    "sana-4k": make_tiny_sana_4k,
}

STUDENTS: dict[str, Callable[[Path], Path]] = {"sana-sprint": make_tiny_sana_sprint}
"""Families that are served, but not distilled: they are few-step students already."""


def open_stock(pipeline_class: Any, base: Path) -> Any:
    """The diffusers pipeline of a base, without the parts that model_index.json says are absent."""
    index = json.loads((base / "model_index.json").read_text())
    return pipeline_class.from_pretrained(base, **{part: None for part, kind in index.items() if kind == [None, None]})


def _unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": _WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def _vae(latent_channels: int, **changes: Any) -> AutoencoderKL:
    """Four pixels per latent cell."""
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=32,
        **{"scaling_factor": 0.5, **changes},
    )


def _clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=_TOKENS, pad_token=pad_token)


def _clip_config(**changes: Any) -> CLIPTextConfig:
    words = 2 * len(pre_tokenizers.ByteLevel.alphabet()) + 2
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_TOKENS,
        projection_dim=_WIDTH,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
        **changes,
    )


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512)


def _t5(width: int = _WIDTH) -> T5EncoderModel:
    words = len(pre_tokenizers.ByteLevel.alphabet()) + 2
    return T5EncoderModel(T5Config(vocab_size=words, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4))


def _qwen_tokenizer() -> Qwen2Tokenizer:
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": words[1:3]})
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    return tokenizer


def _qwen() -> Qwen3Model:
    words = len(pre_tokenizers.ByteLevel.alphabet()) + 3
    return Qwen3Model(
        Qwen3Config(
            vocab_size=words,
            hidden_size=_WIDTH,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=1024,
        )
    )


def _sana_transformer(**settings: Any) -> Any:
    transformer = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=_WIDTH, sample_size=8, **settings,
    )  # fmt: skip
    return _varied(transformer)


def _dc() -> AutoencoderDC:
    """Four pixels per latent cell, where published ones have 32."""
    return AutoencoderDC(
        latent_channels=8,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.5,
    )


def _gemma_tokenizer() -> PreTrainedTokenizerFast:
    """Sentences of the instruction are single tokens, so that sequences stay short."""
    words = ["<pad>", "<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer.add_tokens([line for line in instruction if line != instruction[-1]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def _gemma() -> Gemma2Model:
    words = len(pre_tokenizers.ByteLevel.alphabet()) + 16
    return Gemma2Model(
        Gemma2Config(
            vocab_size=words,
            hidden_size=_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=8,
        )
    )


def _qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    words = len(pre_tokenizers.ByteLevel.alphabet()) + 3
    text = {
        "vocab_size": words,
        "hidden_size": _WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": _WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _deep_qwen() -> Qwen3ForCausalLM:
    """Layers 9, 18 and 27 of it are read."""
    words = len(pre_tokenizers.ByteLevel.alphabet()) + 3
    config = Qwen3Config(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
    )
    return Qwen3ForCausalLM(config)


def _varied(transformer: torch.nn.Module) -> Any:
    """Transformers start with zeros in their last layers; an output of zeros would hide every mistake."""
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return transformer


def _diffusion_scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
