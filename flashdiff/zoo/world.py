"""The image world of the embedded model: CC0 DiceBear avatars, drawn from seeds, with captions read off their own record.

Every image is a pure function of (kind, seed): DiceBear draws the avatar and says what it drew, the tables below turn
that record into words, and `caption` puts the words in some order. Nothing is stored but seeds.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

# One word, one colour: `OBJECT_COLORS` for what is drawn, `BACKGROUND_COLORS` behind it.
OBJECT_COLORS = {
    "red": "#f87171", "orange": "#fb923c", "yellow": "#fcd34d", "green": "#4ade80", "teal": "#2dd4bf",
    "blue": "#60a5fa", "purple": "#a78bfa", "pink": "#f9a8d4", "white": "#e2e8f0", "gray": "#94a3b8",
}  # fmt: skip
BACKGROUND_COLORS = {
    "red": "#be123c", "orange": "#c2410c", "green": "#047857", "teal": "#0f766e", "blue": "#1d4ed8",
    "purple": "#6d28d9", "pink": "#be185d", "navy": "#1e2f5b", "black": "#1c1f27", "cream": "#ffefd5", "white": "#f8fafc",
}  # fmt: skip
NIGHT_COLORS = {word: BACKGROUND_COLORS[word] for word in ("black", "navy", "blue", "purple", "teal", "green", "red")}

_PATTERNS = {
    "belly": "a pale belly", "dots": "dots", "speckles": "speckles", "bar": "a bar", "bars": "bars", "spot": "a spot",
    "stripes": "stripes", "dotRow": "a row of dots", "chevron": "a chevron", "ring": "a ring", "band": "a band",
}  # fmt: skip
_EYES = {
    "round": "round eyes", "dots": "dot eyes", "bigPupils": "big eyes", "sideeye": "sideways eyes", "inward": "crossed eyes",
    "mono": "one eye", "uneven": "uneven eyes", "trio": "three eyes", "threeRow": "three eyes in a row", "four": "four eyes",
    "happy": "happy eyes", "closedLine": "closed eyes", "wink": "a wink", "squint": "squinting eyes", "wide": "wide eyes",
    "sleepy": "sleepy eyes", "angry": "angry eyes", "monoSleepy": "one sleepy eye", "close": "close eyes",
    "square": "square eyes", "visor": "a visor", "cyclops": "a cyclops eye", "plus": "plus eyes",
}  # fmt: skip
_MOUTHS = {
    "smile": "a smile", "tinySmile": "a tiny smile", "grin": "a grin", "laugh": "a laugh", "teeth": "teeth",
    "ooh": "an ooh mouth", "line": "a straight mouth", "smirk": "a smirk", "wavy": "a wavy mouth", "catMouth": "a cat mouth",
    "zigzag": "a zigzag mouth", "frown": "a frown", "sad": "a sad mouth", "slant": "a slanted mouth", "dot": "a dot mouth",
    "open": "an open mouth", "tooth": "one tooth", "tongue": "a tongue", "blep": "a blep", "grill": "a grill",
    "speaker": "a speaker",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One DiceBear style: which options get our colours, and how its record reads as words."""

    style: str
    noun: str  # "" when the noun is an attribute itself (a sprout is named by its plant)
    color: str  # the option that colours the whole thing
    background: dict[str, str]
    parts: dict[str, dict[str, str]]  # option -> variant -> phrase after "with"
    palettes: tuple[str, ...] = ()  # further colour options drawn from OBJECT_COLORS
    fixed: tuple[tuple[str, str], ...] = ()  # options that never vary


KINDS = {
    kind.style: kind
    for kind in (
        Kind(
            style="critters",
            noun="monster",
            color="bodyColor",
            palettes=("accentColor",),
            background=BACKGROUND_COLORS,
            parts={
                "topVariant": {
                    "horns": "horns", "hornsIn": "curved horns", "hornsSmall": "small horns", "spike": "a spike",
                    "antenna": "an antenna", "antennae": "two antennae", "earsRound": "round ears",
                    "earsPointy": "pointy ears", "earsDroop": "droopy ears", "spikes": "spikes", "fin": "a fin",
                    "crown": "a crown", "sprout": "a sprout", "nub": "a nub", "bobble": "a bobble",
                },
                "patternVariant": _PATTERNS,
                "eyesVariant": _EYES,
                "mouthVariant": _MOUTHS,
            },
        ),
        Kind(
            style="sprouts",
            noun="",
            color="potColor",
            palettes=("bloomColor",),
            background=BACKGROUND_COLORS,
            parts={"patternVariant": _PATTERNS, "eyesVariant": _EYES, "mouthVariant": _MOUTHS},
            fixed=(("plantColor", "#22c55e"),),
        ),
        Kind(
            style="planets",
            noun="planet",
            color="planetColor",
            background=NIGHT_COLORS,
            parts={
                "ringVariant": {"thin": "a thin ring", "double": "a double ring", "bold": "a bold ring"},
                "moonsVariant": {"one": "one moon", "two": "two moons", "tiny": "a tiny moon"},
                "surfaceVariant": {
                    "banded": "bands", "belted": "belts", "cratered": "craters", "swirl": "a swirl", "cap": "a polar cap",
                    "spotted": "spots", "marbled": "marbling", "cracked": "cracks", "terra": "continents",
                    "speckled": "speckles",
                },
            },
        ),
        Kind(
            style="voxel-bot",
            noun="robot",
            color="bodyColor",
            palettes=("glowColor",),
            background=BACKGROUND_COLORS,
            parts={
                "topVariant": {
                    "antenna": "an antenna", "twin": "two antennae", "dish": "a dish", "fin": "a fin",
                    "lightbar": "a light bar", "studs": "studs", "siren": "a siren",
                },
                "chestVariant": {
                    "buttons": "buttons", "vents": "vents", "screen": "a screen", "heart": "a heart", "dial": "a dial",
                    "slot": "a slot",
                },
                "eyesVariant": _EYES,
                "mouthVariant": _MOUTHS,
            },
        ),
    )
}  # fmt: skip

PLANTS = {
    "sprout": "sprout", "seedling": "seedling", "cactus": "cactus", "ball": "ball cactus", "succulent": "succulent",
    "bush": "bush", "tall": "tall plant", "flower": "flower", "tulip": "tulip", "palm": "palm", "grass": "grass",
    "buds": "plant with buds",
}  # fmt: skip

# Combinations (colour word, phrase) that training never sees, so that tests show composition and not memory.
HELD_OUT = frozenset(
    {("green", "a crown"), ("yellow", "a siren"), ("purple", "two moons"), ("blue", "cactus"), ("red", "a bold ring")}
)


@dataclass(frozen=True)
class Scene:
    """What one image shows, in words."""

    kind: str
    seed: int
    noun: str
    color: str
    background: str
    parts: tuple[str, ...]

    @property
    def is_held_out(self) -> bool:
        return any((self.color, phrase) in HELD_OUT for phrase in (self.noun, *self.parts))


@cache
def _style(name: str) -> Any:
    from dicebear import Style

    return Style(json.loads((files("dicebear_styles") / f"{name}.json").read_text("utf-8")))


def draw(kind_name: str, seed: int) -> tuple[str, Scene]:
    """The SVG text of one avatar and the scene it shows."""
    from dicebear import Avatar

    kind = KINDS[kind_name]
    options: dict[str, Any] = {"seed": str(seed), "backgroundColor": list(kind.background.values())}
    options |= {name: list(OBJECT_COLORS.values()) for name in (kind.color, *kind.palettes)}
    options |= {name: [value] for name, value in kind.fixed}
    avatar = Avatar(_style(kind.style), options)
    record = avatar.to_json()["options"]
    plant = PLANTS[record["plantVariant"]] if kind_name == "sprouts" else ""
    scene = Scene(
        kind=kind_name,
        seed=seed,
        noun=kind.noun or plant,
        color=_word(OBJECT_COLORS, record[kind.color][0]),
        background=_word(kind.background, record["backgroundColor"][0]),
        parts=tuple(words[record[name]] for name, words in kind.parts.items() if name in record),
    )
    return avatar.to_string(), scene


def render(kind_name: str, seed: int, size: int) -> tuple[NDArray[np.uint8], Scene]:
    """The image [size, size, 3] of one avatar and the scene it shows."""
    import io

    import resvg_py
    from PIL import Image

    svg, scene = draw(kind_name, seed)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), scene


def scenes(kinds: Sequence[str], first_seed: int, count: int, size: int) -> Iterator[tuple[NDArray[np.uint8], Scene]]:
    """`count` images of the kinds in turn, from `first_seed` on; held-out combinations are left out."""
    found, seed = 0, first_seed
    while found < count:
        image, scene = render(kinds[seed % len(kinds)], seed, size)
        seed += 1
        if not scene.is_held_out:
            found += 1
            yield image, scene


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many true captions of the scene: order, wording and completeness vary with `rng`."""
    parts = [phrase for phrase in scene.parts if rng.random() < 0.8]
    rng.shuffle(parts)
    color = scene.color if rng.random() < 0.95 else ""
    background = f"{scene.background} background" if rng.random() < 0.9 else ""
    if scene.kind == "sprouts":
        thing = f"{scene.noun} in {_article(f'{color} pot'.strip())}"
    else:
        thing = f"{color} {scene.noun}".strip()

    style = rng.random()
    if style < 0.2:  # tags
        tags = [phrase.removeprefix("a ").removeprefix("an ") for phrase in (*parts, background) if phrase]
        return ", ".join([thing, *tags])
    said = _article(thing) + (f" with {_listing(parts)}" if parts else "")
    if background and style < 0.35:
        return f"on {_article(background)}, {said}"
    return f"{said} on {_article(background)}" if background else said


def _word(table: dict[str, str], color: str) -> str:
    return next(word for word, value in table.items() if value == color)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listing(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
