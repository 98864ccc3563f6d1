"""The well-known few-step students: how each is sampled, as its authors say. Plain values, cheap to import."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """What `--preset NAME` stands for; the fields from `sampler` on are those of `SamplingOptions`."""

    name: str
    family: str
    source: str
    """The repository on the Hugging Face hub whose card says so."""
    pattern: str
    """A regular expression that the student's file or folder name matches, in lower case with single hyphens."""
    sampler: str
    steps: int
    spacing: Literal["leading", "linspace", "trailing"] | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float | None = None
    shift: float | None = None
    guidance: float = 0.0
    prediction: Literal["sample"] | None = None
    most_steps: int | None = None


_BASES = ("sd15", "sdxl")
_HYPER = "ByteDance/Hyper-SD"
_PCM = "wangfuyun/PCM_Weights"
_PCM_TIMES = (999, 759, 499, 259)


def _trailing(name: str, family: str, source: str, pattern: str, sampler: str, steps: int) -> Preset:
    """Of a student that was trained for this number of steps alone."""
    return Preset(name, family, source, pattern, sampler, steps, spacing="trailing", most_steps=steps)


_LIGHTNING = "ByteDance/SDXL-Lightning"
_ALL = (
    Preset(
        "sdxl-lightning-1", "sdxl", _LIGHTNING, r"lightning.*\b1-?steps?\b", "euler", 1,
        spacing="trailing", prediction="sample", most_steps=1,
    ),
    *(
        _trailing(f"sdxl-lightning-{steps}", "sdxl", _LIGHTNING, rf"lightning.*\b{steps}-?steps?\b", "euler", steps)
        for steps in (2, 4, 8)
    ),
    Preset(
        "sdxl-turbo", "sdxl", "stabilityai/sdxl-turbo", r"sdxl-turbo|turbo-xl", "euler-ancestral", 1,
        spacing="trailing", most_steps=8,
    ),
    Preset("sd-turbo", "sd15", "stabilityai/sd-turbo", r"\bsd-turbo", "euler", 1, spacing="trailing", most_steps=8),
    Preset("lcm-lora-sd15", "sd15", "latent-consistency/lcm-lora-sdv1-5", r"lcm(?!like)", "lcm", 4),
    Preset("lcm-lora-sdxl", "sdxl", "latent-consistency/lcm-lora-sdxl", r"lcm(?!like)", "lcm", 4),
    *(
        _trailing(f"hyper-{base}-{steps}", base, _HYPER, rf"hyper-?{base}-{steps}-?steps?\b(?!.*cfg)", "ddim", steps)
        for base in _BASES
        for steps in (2, 4, 8)
    ),
    # The unified LoRA, for 1 to 8 steps.
    *(
        Preset(f"hyper-{base}-1", base, _HYPER, rf"hyper-?{base}-1-?step-lora", "tcd", 1, eta=1.0, most_steps=8)
        for base in _BASES
    ),
    *(
        Preset(
            f"hyper-{base}-{steps}-cfg", base, _HYPER, rf"hyper-?{base}-{steps}-?steps?-cfg", "ddim", steps,
            spacing="trailing", guidance=5.0,
        )
        for base in _BASES
        for steps in (8, 12)
    ),
    Preset("hyper-sdxl-1-unet", "sdxl", _HYPER, r"hyper-?sdxl-1-?step-unet", "lcm", 1, timesteps=(800,)),
    # The card asks for a LoRA weight of 0.125 for FLUX and SD3.
    *(
        Preset(f"hyper-flux-{steps}", "flux", _HYPER, rf"hyper-?flux.*\b{steps}-?steps?\b", "flow-euler", steps, guidance=3.5)
        for steps in (8, 16)
    ),
    *(
        Preset(
            f"hyper-sd3-{steps}-cfg", "sd3", _HYPER, rf"hyper-?sd3-{steps}-?steps?-cfg", "flow-euler", steps,
            spacing="linspace", guidance=5.0,
        )
        for steps in (4, 8, 16)
    ),
    Preset("dmd2-sdxl-1", "sdxl", "tianweiy/DMD2", r"\bdmd2.*\b1-?step", "lcm", 1, timesteps=(399,)),
    Preset("dmd2-sdxl-4", "sdxl", "tianweiy/DMD2", r"\bdmd2", "lcm", 4, timesteps=(999, 749, 499, 249)),
    Preset("tcd-sd15", "sd15", "h1t/TCD-SD15-LoRA", r"\btcd(?!-sd21)", "tcd", 4, eta=0.3),
    Preset("tcd-sd21", "sd15", "h1t/TCD-SD21-base-LoRA", r"\btcd-sd21", "tcd", 4, eta=0.3),
    Preset("tcd-sdxl", "sdxl", "h1t/TCD-SDXL-LoRA", r"\btcd", "tcd", 4, eta=0.3),
    *(
        _trailing(f"pcm-{base}-{steps}", base, _PCM, rf"\bpcm.*smallcfg-{steps}-?steps?", "ddim", steps)
        for base in _BASES
        for steps in (2, 4, 8, 16)
    ),
    *(
        Preset(
            f"pcm-{base}-{steps}-cfg", base, _PCM, rf"\bpcm.*normalcfg-{steps}-?steps?", "ddim", steps,
            spacing="trailing", guidance=7.5, most_steps=steps,
        )
        for base in _BASES
        for steps in (4, 8, 16)
    ),
    *(Preset(f"pcm-{base}-lcm", base, _PCM, r"\bpcm.*lcmlike", "lcm", 4) for base in _BASES),
    # The authors' own scheduler takes every twentieth time of a flow, and four of those (text_to_image_sd3/sd3_test.py).
    *(
        Preset(
            f"pcm-sd3-{steps}-shift{shift}", "sd3", _PCM, rf"\bpcm-deterministic-{steps}-?steps?-shift{shift}", "flow-euler",
            steps, timesteps=_PCM_TIMES, shift=float(shift), guidance=1.2,
        )
        for steps, shift in ((2, 1), (4, 1), (4, 3))
    ),
    Preset(
        "pcm-sd3-stochastic", "sd3", _PCM, r"\bpcm-stochastic-shift3", "flow-euler", 4,
        timesteps=_PCM_TIMES, eta=1.0, shift=3.0, guidance=1.2,
    ),
    Preset("flash-sd15", "sd15", "jasperai/flash-sd", r"\bflash-(sd|sdxl|pixart)", "lcm", 4),
    Preset("flash-sdxl", "sdxl", "jasperai/flash-sdxl", r"\bflash-(sd|sdxl|pixart)", "lcm", 4),
    Preset("flash-pixart", "pixart", "jasperai/flash-pixart", r"\bflash-(sd|sdxl|pixart)", "lcm", 4),
    # Its own scheduler is a flow's Euler that noises anew before each step.
    Preset("flash-sd3", "sd3", "jasperai/flash-sd3", r"\bflash-sd3", "flow-euler", 4, spacing="linspace", eta=1.0),
    Preset("flux-schnell", "flux", "black-forest-labs/FLUX.1-schnell", r"schnell", "flow-euler", 4, spacing="trailing"),
    Preset(
        "sd35-large-turbo", "sd3", "stabilityai/stable-diffusion-3.5-large-turbo", r"3-5-large-turbo", "flow-euler", 4,
        spacing="linspace",
    ),
    Preset("z-image-turbo", "z-image", "Tongyi-MAI/Z-Image-Turbo", r"z-image-turbo", "flow-euler", 8, spacing="trailing"),
    *(
        Preset(
            f"qwen-image-lightning-{steps}", "qwen-image", "lightx2v/Qwen-Image-Lightning",
            rf"qwen-image.*lightning.*\b{steps}-?steps?\b", "flow-euler", steps, spacing="trailing", shift=3.0, most_steps=steps,
        )
        for steps in (4, 8)
    ),
    Preset(
        "sana-sprint", "sana-sprint", "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers", r"sana-sprint", "scm", 2,
        guidance=4.5,
    ),
)  # fmt: skip

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
