"""Stable Diffusion 1.x and models of its form: one CLIP text encoder, a UNet with cross-attention, a 2-D autoencoder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.components import ModelSpec, Size
from flashdiff.errors import ModelError, first_line
from flashdiff.families.base import ModelFamily, TorchModel, read_config
from flashdiff.sampling import Sampler
from flashdiff.schedule import NoiseSchedule
from flashdiff.text import PromptTokenizer

_AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")


class _TextEncoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        return (self.model(input_ids).last_hidden_state,)


class _Denoiser(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        output: Tensor = self.unet(latents, times, encoder_hidden_states, return_dict=False)[0]
        return output


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        images: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return images


def _read_spec(folder: Path) -> ModelSpec:
    try:
        return _spec_of_configs(folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelError(f"{folder}: a configuration file lacks or misstates {first_line(error)}") from None


def _spec_of_configs(folder: Path) -> ModelSpec:
    unet, vae = read_config(folder, "unet"), read_config(folder, "vae")
    scheduler = read_config(folder, "scheduler", "scheduler_config.json")
    tokenizer = read_config(folder, "tokenizer", "tokenizer_config.json")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ModelError(f"{folder}: prediction_type '{prediction}' is not supported; epsilon and v_prediction are")
    # AutoencoderKL names its levels block_out_channels, AutoencoderTiny decoder_block_out_channels.
    levels = len(vae.get("block_out_channels") or vae["decoder_block_out_channels"])
    factor = 2 ** (levels - 1)
    return ModelSpec(
        name=folder.resolve().name,
        family=FAMILY.name,
        prediction=prediction,
        sampler=Sampler(
            kind="ode",
            schedule=NoiseSchedule.from_scheduler_config(scheduler, source=f"{folder}/scheduler"),
            guidance=FAMILY.default_guidance,
            default_steps=FAMILY.default_steps,
        ),
        latent_channels=unet["in_channels"],
        latent_factor=factor,
        sizes=(Size(unet["sample_size"] * factor, unet["sample_size"] * factor),),
        prompt_tokens=tokenizer["model_max_length"],
    )


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    def part(name: str, kind: Any) -> Any:
        try:
            model, info = kind.from_pretrained(folder / name, torch_dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # the loaders raise many kinds for a missing or damaged file
            raise ModelError(f"{folder}: cannot load {name}: {first_line(error)}") from None
        if info["missing_keys"]:  # the loaders would make them up
            raise ModelError(f"{folder}: {name} lacks weights, {sorted(info['missing_keys'])[0]} among them")
        return model.eval().requires_grad_(False)

    vae_class = str(read_config(folder, "vae").get("_class_name"))
    if vae_class not in _AUTOENCODERS:
        raise ModelError(f"{folder}: the vae is a {vae_class}; supported: {', '.join(_AUTOENCODERS)}")
    vae = part("vae", getattr(diffusers, vae_class))
    unet = part("unet", diffusers.UNet2DConditionModel)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except Exception as error:
        raise ModelError(f"{folder}: cannot load tokenizer: {first_line(error)}") from None

    def encode_images(images: Tensor, generator: torch.Generator) -> Tensor:
        encoded = vae.encode(images)
        latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
        scaled: Tensor = latents * vae.config.scaling_factor
        return scaled

    return TorchModel(
        spec=spec,
        folder=folder,
        conditioning=FAMILY.conditioning,
        tokenizer=PromptTokenizer.from_json(
            tokenizer.backend_tokenizer.to_str(), length=spec.prompt_tokens, pad_id=tokenizer.pad_token_id
        ),
        text_encoder=_TextEncoder(part("text_encoder", CLIPTextModel)).eval(),
        denoiser=_Denoiser(unet).eval(),
        decoder=_Decoder(vae).eval(),
        encode_images=encode_images,
        network=unet,
    )


FAMILY = ModelFamily(
    name="sd15",
    pipeline_class="StableDiffusionPipeline",
    conditioning=("encoder_hidden_states",),
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    feature_tap=lambda unet: unet.mid_block,
    lora_prefix="unet",
    default_guidance=7.5,
    default_steps=50,
    read_spec=_read_spec,
    load=_load,
)
