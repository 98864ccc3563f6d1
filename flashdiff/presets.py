"""The well-known few-step students: how each is sampled, as its authors say. Plain values, cheap to import."""

from dataclasses import dataclass
from typing import Literal

_HUB = "huggingface.co"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What `--preset NAME` stands for; the fields after `pattern` are those of `SamplingOptions`."""

    name: str
    family: str
    source: str
    """Where the authors say so."""
    pattern: str = ""
    """A regular expression that the student's file or folder name matches, in lower case with single hyphens; empty: none."""
    sampler: str
    steps: int
    spacing: Literal["leading", "linspace", "trailing"] | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float | None = None
    guidance: float = 0.0
    prediction: Literal["sample"] | None = None
    most_steps: int | None = None


def _lightning(steps: int, prediction: Literal["sample"] | None = None) -> Preset:
    return Preset(
        name=f"sdxl-lightning-{steps}",
        family="sdxl",
        source=f"{_HUB}/ByteDance/SDXL-Lightning",
        pattern=rf"lightning.*\b{steps}-?steps?\b",
        sampler="euler",
        spacing="trailing",
        steps=steps,
        most_steps=steps,
        prediction=prediction,
    )


def _hyper(family: str, title: str, steps: int) -> Preset:
    return Preset(
        name=f"hyper-{family}-{steps}",
        family=family,
        source=f"{_HUB}/ByteDance/Hyper-SD",
        pattern=rf"hyper-?{title}-{steps}-?steps?\b(?!.*cfg)",
        sampler="ddim",
        spacing="trailing",
        steps=steps,
        most_steps=steps,
    )


def _hyper_one(family: str, title: str) -> Preset:
    """The unified LoRA, for 1 to 8 steps."""
    source, pattern = f"{_HUB}/ByteDance/Hyper-SD", rf"hyper-?{title}-1-?step-lora"
    return Preset(
        name=f"hyper-{family}-1", family=family, source=source, pattern=pattern, sampler="tcd", eta=1.0, steps=1, most_steps=8
    )


def _hyper_cfg(family: str, title: str, steps: int) -> Preset:
    return Preset(
        name=f"hyper-{family}-{steps}-cfg",
        family=family,
        source=f"{_HUB}/ByteDance/Hyper-SD",
        pattern=rf"hyper-?{title}-{steps}-?steps?-cfg",
        sampler="ddim",
        spacing="trailing",
        steps=steps,
        guidance=5.0,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _lightning(1, prediction="sample"),
        *map(_lightning, (2, 4, 8)),
        Preset(
            name="sdxl-turbo",
            family="sdxl",
            source=f"{_HUB}/stabilityai/sdxl-turbo",
            pattern=r"sdxl-turbo|turbo-xl",
            sampler="euler-ancestral",
            spacing="trailing",
            steps=1,
            most_steps=8,
        ),
        Preset(
            name="sd-turbo",
            family="sd15",
            source=f"{_HUB}/stabilityai/sd-turbo",
            pattern=r"\bsd-turbo",
            sampler="euler",
            spacing="trailing",
            steps=1,
            most_steps=8,
        ),
        Preset(
            name="lcm-lora-sd15",
            family="sd15",
            source=f"{_HUB}/latent-consistency/lcm-lora-sdv1-5",
            pattern=r"lcm",
            sampler="lcm",
            steps=4,
        ),
        Preset(
            name="lcm-lora-sdxl",
            family="sdxl",
            source=f"{_HUB}/latent-consistency/lcm-lora-sdxl",
            pattern=r"lcm",
            sampler="lcm",
            steps=4,
        ),
        *(_hyper("sd15", "sd15", steps) for steps in (2, 4, 8)),
        *(_hyper("sdxl", "sdxl", steps) for steps in (2, 4, 8)),
        _hyper_one("sd15", "sd15"),
        _hyper_one("sdxl", "sdxl"),
        *(_hyper_cfg(family, family, steps) for family in ("sd15", "sdxl") for steps in (8, 12)),
        Preset(
            name="hyper-sdxl-1-unet",
            family="sdxl",
            source=f"{_HUB}/ByteDance/Hyper-SD",
            pattern=r"hyper-?sdxl-1-?step-unet",
            sampler="lcm",
            timesteps=(800,),
            steps=1,
        ),
        Preset(
            name="hyper-flux-8",
            family="flux",
            source=f"{_HUB}/ByteDance/Hyper-SD (LoRA weight 0.125)",
            pattern=r"hyper-?flux.*\b8-?steps?\b",
            sampler="flow-euler",
            steps=8,
            guidance=3.5,
        ),
        Preset(
            name="dmd2-sdxl-4",
            family="sdxl",
            source=f"{_HUB}/tianweiy/DMD2",
            pattern=r"dmd2.*\b4-?step|\bdmd2",
            sampler="lcm",
            timesteps=(999, 749, 499, 249),
            steps=4,
        ),
        Preset(
            name="dmd2-sdxl-1",
            family="sdxl",
            source=f"{_HUB}/tianweiy/DMD2",
            pattern=r"dmd2.*\b1-?step",
            sampler="lcm",
            timesteps=(399,),
            steps=1,
        ),
        *(
            Preset(
                name=f"tcd-{family}",
                family=family,
                source=f"{_HUB}/h1t/TCD-{title}-LoRA",
                pattern=r"\btcd",
                sampler="tcd",
                eta=0.3,
                steps=4,
            )
            for family, title in (("sd15", "SD15"), ("sdxl", "SDXL"))
        ),
        *(
            Preset(
                name=f"pcm-{family}-{steps}",
                family=family,
                source=f"{_HUB}/wangfuyun/PCM_Weights",
                pattern=rf"\bpcm.*smallcfg-{steps}-?steps?",
                sampler="ddim",
                spacing="trailing",
                steps=steps,
                most_steps=steps,
            )
            for family in ("sd15", "sdxl")
            for steps in (2, 4, 8, 16)
        ),
        *(
            Preset(
                name=f"flash-{family}",
                family=family,
                source=f"{_HUB}/jasperai/flash-{title}",
                pattern=r"\bflash-(sd|sdxl|pixart)",
                sampler="lcm",
                steps=4,
            )
            for family, title in (("sd15", "sd"), ("sdxl", "sdxl"), ("pixart", "pixart"))
        ),
        Preset(
            name="flux-schnell",
            family="flux",
            source=f"{_HUB}/black-forest-labs/FLUX.1-schnell",
            pattern=r"schnell",
            sampler="flow-euler",
            spacing="trailing",
            steps=4,
        ),
        Preset(
            name="sd35-large-turbo",
            family="sd3",
            source=f"{_HUB}/stabilityai/stable-diffusion-3.5-large-turbo",
            pattern=r"3-5-large-turbo",
            sampler="flow-euler",
            spacing="linspace",
            steps=4,
        ),
        Preset(
            name="z-image-turbo",
            family="z-image",
            source=f"{_HUB}/Tongyi-MAI/Z-Image-Turbo",
            pattern=r"z-image-turbo",
            sampler="flow-euler",
            spacing="trailing",
            steps=8,
        ),
    )
}
