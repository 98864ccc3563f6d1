"""SANA-Sprint: Sana as a consistency student of continuous time, whose network takes its guidance as an input."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashdiff.components import ModelSpec
from flashdiff.families.base import GUIDANCE, TorchModel
from flashdiff.families.loading import explain_bad_settings, read_config, spec_of
from flashdiff.families.sana import FAMILY as SANA
from flashdiff.families.sana import TextEncoder, load_sana, sana_tokenizer
from flashdiff.schedule import FlowSchedule
from flashdiff.text import PromptTokenizer

_SIGMA_DATA = 0.5  # the standard deviation of its latents
_EMBEDDED_GUIDANCE = 4.5  # what the model's own pipeline feeds it


class _TextEncoder(TextEncoder):
    """Sana's, and the guidance scale that the network is given."""

    def __init__(self, gemma: Any, tokenizer: PromptTokenizer, guidance: float) -> None:
        super().__init__(gemma, tokenizer)
        self.guidance = guidance

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        states, mask = super().forward(input_ids)
        return states, mask, torch.full_like(mask[:, 0], self.guidance)


class _Denoiser(nn.Module):
    """The velocity dx/dt of x_t = cos(t) x_0 + sin(t) z from a flow's network (SANA-Sprint, arXiv 2503.09641, eq. 8 to 10)."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, latents: Tensor, times: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, guidance: Tensor
    ) -> Tensor:
        flow_times = torch.sin(times) / (torch.cos(times) + torch.sin(times))
        s = flow_times.view(-1, 1, 1, 1)
        norm = torch.sqrt(s**2 + (1 - s) ** 2)
        flow_latents = latents / _SIGMA_DATA * norm
        output = self.transformer(
            flow_latents.to(latents.dtype),
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            guidance=guidance * self.transformer.config.guidance_embeds_scale,
            timestep=flow_times,
            return_dict=False,
        )[0]
        velocity: Tensor = ((1 - 2 * s) * flow_latents + (1 - 2 * s + 2 * s**2) * output) / norm * _SIGMA_DATA
        return velocity


@explain_bad_settings
def _read_spec(folder: Path) -> ModelSpec:
    transformer = read_config(folder, "transformer")
    return spec_of(
        folder,
        FAMILY,
        prediction="trigflow",
        schedule=FlowSchedule(shift=1.0),  # its sampler has levels of its own
        network_channels=transformer["in_channels"],
        latent_side=transformer["sample_size"],
        sampling={"kind": "scm", "embedded_guidance": _EMBEDDED_GUIDANCE},
        tokenizers=(sana_tokenizer(folder),),
    )


def _load(folder: Path, spec: ModelSpec) -> TorchModel:
    guidance = spec.sampler.embedded_guidance
    assert guidance is not None
    return load_sana(
        folder,
        spec,
        text_encoder=lambda gemma, tokenizer: _TextEncoder(gemma, tokenizer, guidance),
        denoiser=_Denoiser,
        scale=_SIGMA_DATA,
    )


FAMILY = replace(
    SANA,
    name="sana-sprint",
    pipeline_class="SanaSprintPipeline",
    conditioning=(*SANA.conditioning, GUIDANCE),
    float32_inputs=(GUIDANCE,),
    default_guidance=1.0,  # none but the embedded one
    default_steps=2,
    fixed={"transformer": {"interpolation_scale": (None,), "guidance_embeds": (True,)}},
    read_spec=_read_spec,
    load=_load,
)
