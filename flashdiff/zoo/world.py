"""The image world of the embedded model: CC0 DiceBear avatars, drawn from seeds, with captions read off their own record.

Every image is a pure function of (kind, seed): DiceBear draws the avatar and says what it drew, the tables below turn
that record into words, and `caption` puts the words in some order. Nothing is stored but seeds.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
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
_MOOD_EYES = {
    "pupils": "round eyes", "bigPupils": "big eyes", "sparkle": "sparkling eyes", "small": "small eyes", "uneven": "uneven eyes",
    "tallPupils": "tall eyes", "lookSide": "sideways eyes", "lookDown": "downcast eyes", "lookUp": "raised eyes",
    "happy": "happy eyes", "closed": "closed eyes", "wink": "a wink", "squint": "squinting eyes", "sleepy": "sleepy eyes",
    "calm": "calm eyes", "angry": "angry eyes",
}  # fmt: skip
_MOUTHS = {
    "smile": "a smile", "tinySmile": "a tiny smile", "grin": "a grin", "laugh": "a laugh", "teeth": "teeth",
    "ooh": "an ooh mouth", "line": "a straight mouth", "smirk": "a smirk", "wavy": "a wavy mouth", "catMouth": "a cat mouth",
    "zigzag": "a zigzag mouth", "frown": "a frown", "sad": "a sad mouth", "slant": "a slanted mouth", "dot": "a dot mouth",
    "open": "an open mouth", "tooth": "one tooth", "tongue": "a tongue", "blep": "a blep", "grill": "a grill",
    "speaker": "a speaker",
    "wide": "a wide mouth", "bigSmile": "a big smile", "smileOpen": "an open smile", "cat": "a cat mouth", "gasp": "a gasp",
    "flat": "a straight mouth", "wideSmile": "a wide smile",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One DiceBear style: which options get our colours, and how its record reads as words.

    The options named `<attribute>Variant` are the attributes; `phrases` says how a variant reads after "with".
    """

    style: str
    noun: str
    color: str  # the option that colours the main thing
    background: dict[str, str]
    phrases: dict[str, dict[str, str]]  # attribute -> variant -> phrase
    palettes: tuple[str, ...] = ()  # further colour options drawn from OBJECT_COLORS
    fixed: tuple[tuple[str, Any], ...] = ()  # options that never vary
    hats: frozenset[str] = frozenset()  # top variants coloured by hatColor instead of `color`


KINDS = {
    kind.style: kind
    for kind in (
        Kind(
            style="critters",
            noun="monster",
            color="bodyColor",
            palettes=("accentColor",),
            background=BACKGROUND_COLORS,
            phrases={
                "top": {
                    "horns": "horns", "hornsIn": "curved horns", "hornsSmall": "small horns", "spike": "a spike",
                    "antenna": "an antenna", "antennae": "two antennae", "earsRound": "round ears",
                    "earsPointy": "pointy ears", "earsDroop": "droopy ears", "spikes": "spikes", "fin": "a fin",
                    "crown": "a crown", "sprout": "a sprout", "nub": "a nub", "bobble": "a bobble",
                },
                "pattern": _PATTERNS,
                "eyes": _EYES,
                "mouth": _MOUTHS,
            },
        ),
        Kind(
            style="sprouts",
            noun="pot",
            color="potColor",
            palettes=("bloomColor",),
            background=BACKGROUND_COLORS,
            phrases={
                "plant": {
                    "sprout": "a sprout", "seedling": "a seedling", "cactus": "a cactus", "ball": "a ball cactus",
                    "succulent": "a succulent", "bush": "a bush", "tall": "a tall plant", "flower": "a flower",
                    "tulip": "a tulip", "palm": "a palm", "grass": "grass", "buds": "a plant with buds",
                },
                "pattern": _PATTERNS,
                "eyes": _EYES,
                "mouth": _MOUTHS,
            },
            fixed=(("plantColor", ["#22c55e"]),),
        ),
        Kind(
            style="planets",
            noun="planet",
            color="planetColor",
            background=NIGHT_COLORS,
            phrases={
                "ring": {"thin": "a thin ring", "double": "a double ring", "bold": "a bold ring"},
                "moons": {"one": "one moon", "two": "two moons", "tiny": "a tiny moon"},
                "surface": {
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
            phrases={
                "top": {
                    "antenna": "an antenna", "twin": "two antennae", "dish": "a dish", "fin": "a fin",
                    "lightbar": "a light bar", "studs": "studs", "siren": "a siren",
                },
                "chest": {
                    "buttons": "buttons", "vents": "vents", "screen": "a screen", "heart": "a heart", "dial": "a dial",
                    "slot": "a slot",
                },
                "eyes": _EYES,
                "mouth": _MOUTHS,
            },
        ),
        Kind(
            style="voxel-art",
            noun="person",
            color="hairColor",
            palettes=("hatColor",),
            background=BACKGROUND_COLORS,
            phrases={
                "top": {
                    "short": "short hair", "spiky": "spiky hair", "bowl": "a bowl cut", "sideSwept": "swept hair",
                    "curly": "curly hair", "mohawk": "a mohawk", "buns": "hair buns", "ponytail": "a ponytail", "bob": "a bob",
                    "shoulderLength": "shoulder length hair", "longStraight": "long hair", "longWavy": "long wavy hair",
                    "partedLong": "long parted hair", "braids": "braids", "twinTails": "pigtails", "cap": "a cap",
                    "beanie": "a beanie", "animalEars": "a hood with ears", "bunnyEars": "a bunny hood", "afro": "an afro",
                    "halfShaved": "half shaved hair",
                },
                "outfit": {
                    "plain": "a plain shirt", "stripes": "a striped shirt", "jacket": "a jacket", "checker": "a checkered shirt",
                    "overalls": "overalls", "hoodie": "a hoodie", "tie": "a tie", "coat": "a coat", "dress": "a dress",
                    "suit": "a suit",
                },
                "beard": {"full": "a full beard", "mustache": "a mustache", "goatee": "a goatee", "stubble": "stubble"},
                "glasses": {
                    "round": "round glasses", "square": "square glasses", "shades": "sunglasses", "cat": "cat glasses",
                    "visor": "a visor",
                },
                "mouth": _MOUTHS,
            },
            fixed=(("topProbability", 100),),
            hats=frozenset({"cap", "beanie", "animalEars", "bunnyEars"}),
        ),
        Kind(
            style="moods",
            noun="face",
            color="faceColor",
            background=BACKGROUND_COLORS,
            phrases={
                "face": {
                    "circle": "a round shape", "squircle": "a rounded shape", "softSquare": "a square shape",
                    "wide": "a wide shape", "tall": "a tall shape", "hexagon": "a hexagon shape", "bean": "a bean shape",
                    "pebble": "a pebble shape", "blob": "a blob shape",
                },
                "eyes": _MOOD_EYES,
                "mouth": _MOUTHS,
            },
        ),
    )
}  # fmt: skip

# Combinations (colour word, phrase) that training never sees, so that tests show composition and not memory.
HELD_OUT = frozenset(
    {
        ("green", "a crown"), ("yellow", "a siren"), ("purple", "two moons"), ("blue", "a cactus"), ("red", "a bold ring"),
        ("pink", "a mohawk"), ("orange", "angry eyes"),
    }
)  # fmt: skip


ABSENT = "none"
"""The word for an attribute that the kind can have and the image has not."""


@cache
def attribute_words() -> dict[str, tuple[str, ...]]:
    """Every attribute a scene can have, and the words or phrases it can take, in a fixed order."""
    words: dict[str, set[str]] = {
        "kind": {kind.noun for kind in KINDS.values()},
        "color": set(OBJECT_COLORS),
        "background": set(BACKGROUND_COLORS),
    }
    for kind in KINDS.values():
        for name, phrases in kind.phrases.items():
            words.setdefault(name, set()).update(phrases.values())
    always = ("kind", "color", "background")
    return {name: (*sorted(found), *(() if name in always else (ABSENT,))) for name, found in words.items()}


_NOT_OF_FIGURE = ("background", "star", "animation")
"""The first letters of DiceBear's options that draw what is around a figure."""


@dataclass(frozen=True)
class Scene:
    """What one image shows, in words."""

    kind: str
    seed: int
    color: str
    background: str
    phrases: Mapping[str, str]
    """attribute -> phrase, for the attributes that are drawn."""

    @property
    def attributes(self) -> dict[str, str]:
        """Everything a probe can be asked about: attribute -> word or phrase."""
        return {"kind": KINDS[self.kind].noun, "color": self.color, "background": self.background, **self.phrases}

    @property
    def is_held_out(self) -> bool:
        return any((self.color, phrase) in HELD_OUT for phrase in self.phrases.values())


def attribute_labels(scenes: Sequence[Scene]) -> dict[str, NDArray[np.int64]]:
    """Per attribute, which of its words each scene shows [N]; -1 where the kind cannot have the attribute."""
    labels = {}
    for name, words in attribute_words().items():
        index = {word: position for position, word in enumerate(words)}
        absent = [index[ABSENT] if name in KINDS[scene.kind].phrases else -1 for scene in scenes]
        rows = [
            index[scene.attributes[name]] if name in scene.attributes else none
            for scene, none in zip(scenes, absent, strict=True)
        ]
        labels[name] = np.array(rows)
    return labels


@cache
def _definition(name: str) -> Any:
    return json.loads((files("dicebear_styles") / f"{name}.json").read_text("utf-8"))


@cache
def _style(name: str) -> Any:
    from dicebear import Style

    return Style(_definition(name))


def describe(kind_name: str, seed: int, background: str | None = None) -> Scene:
    """The scene that `render` shows, without drawing it; with a word of its kind's `background`, on that."""
    return _scene(kind_name, seed, _avatar(kind_name, seed, background=background))


def figure(kind_name: str, seed: int) -> dict[str, str]:
    """What draws the figure of a seed, captioned or not: its variants and colours by DiceBear's names; `ABSENT` for no variant.

    The background, with its stars, is not among them, and neither is where eyes, mouths and moons lie.
    """
    kind, record = KINDS[kind_name], _avatar(kind_name, seed).to_json()["options"]
    parts = [name for name in _definition(kind.style)["components"] if not name.startswith(_NOT_OF_FIGURE)]
    found = {f"{name}Variant": str(record.get(f"{name}Variant", ABSENT)) for name in parts}
    colors = (name for name in record if name.endswith("Color") and not name.startswith(_NOT_OF_FIGURE))
    return found | {name: record[name][0] for name in colors}


def _avatar(kind_name: str, seed: int, like: int | None = None, background: str | None = None) -> Any:
    from dicebear import Avatar

    kind = KINDS[kind_name]
    options: dict[str, Any] = {"backgroundColor": list(kind.background.values())}
    options |= {name: list(OBJECT_COLORS.values()) for name in (kind.color, *kind.palettes)}
    options |= dict(kind.fixed)
    if background is not None:
        options["backgroundColor"] = [kind.background[background]]
    if like is not None and background is not None:
        for name, value in figure(kind_name, like).items():
            if value != ABSENT:
                options[name] = [value]
            if name.endswith("Variant"):
                options[name.removesuffix("Variant") + "Probability"] = 0 if value == ABSENT else 100
    elif like is not None:
        record = Avatar(_style(kind.style), {**options, "seed": str(like)}).to_json()["options"]
        named = ("backgroundColor", kind.color, "hatColor" if kind.hats else kind.color)
        options |= {name: record[name] for name in named if name in record}
        for name in kind.phrases:
            drawn = record.get(f"{name}Variant")
            options |= {f"{name}Variant": [drawn], f"{name}Probability": 100} if drawn else {f"{name}Probability": 0}
    return Avatar(_style(kind.style), {**options, "seed": str(seed)})


def _scene(kind_name: str, seed: int, avatar: Any) -> Scene:
    kind, record = KINDS[kind_name], avatar.to_json()["options"]
    color = "hatColor" if record.get("topVariant") in kind.hats else kind.color
    return Scene(
        kind=kind_name,
        seed=seed,
        color=_word(OBJECT_COLORS, record[color][0]),
        background=_word(kind.background, record["backgroundColor"][0]),
        phrases={name: words[record[f"{name}Variant"]] for name, words in kind.phrases.items() if f"{name}Variant" in record},
    )


def render(
    kind_name: str, seed: int, size: int, like: int | None = None, background: str | None = None
) -> tuple[NDArray[np.uint8], Scene]:
    """The image [size, size, 3] of one avatar and the scene it shows.

    `like` names a seed whose colours and attributes are kept: only what captions do not mention is drawn from `seed`. With
    `background`, a word of the kind's, all of its `figure` is kept, and stands on that.
    """
    import io

    import resvg_py
    from PIL import Image

    avatar = _avatar(kind_name, seed, like, background)
    png = bytes(resvg_py.svg_to_bytes(svg_string=avatar.to_string(), width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), _scene(kind_name, seed, avatar)


def scenes(kinds: Sequence[str], first_seed: int, count: int, size: int) -> Iterator[tuple[NDArray[np.uint8], Scene]]:
    """`count` images [size, size, 3] of the kinds in turn, from `first_seed` on; held-out combinations are left out."""
    found, seed = 0, first_seed
    while found < count:
        image, scene = render(kinds[seed % len(kinds)], seed, size)
        seed += 1
        if not scene.is_held_out:
            found += 1
            yield image, scene


def caption(scene: Scene, rng: random.Random) -> str:
    """One of many true captions of the scene: order, wording and completeness vary with `rng`.

    A quarter are short ("a green monster"), a third say everything, the rest leave attributes out at random.
    """
    kept = rng.choices((0.15, 0.7, 1.0), weights=(0.25, 0.4, 0.35))[0]
    said = {name: phrase for name, phrase in scene.phrases.items() if rng.random() < kept}
    color = scene.color if rng.random() < max(kept, 0.7) else ""
    background = f"{scene.background} background" if rng.random() < max(kept, 0.4) else ""
    thing = _thing(scene, said, color)  # takes out of `said` what it says itself
    parts = list(said.values())
    rng.shuffle(parts)

    style = rng.random()
    if style < 0.2:  # tags
        tags = [_bare(phrase) for phrase in (*parts, background) if phrase]
        return ", ".join([thing, *tags])
    sentence = _article(thing) + (f" with {_listing(parts)}" if parts else "")
    if background and style < 0.35:
        return f"on {_article(background)}, {sentence}"
    return f"{sentence} on {_article(background)}" if background else sentence


def full_caption(scene: Scene) -> str:
    """The caption that says everything, in one fixed order."""
    said = dict(scene.phrases)
    thing = _thing(scene, said, scene.color)
    parts = f" with {_listing(list(said.values()))}" if said else ""
    return f"{_article(thing)}{parts} on {_article(scene.background)} background"


def short_caption(scene: Scene) -> str:
    """The caption that says the kind and the background alone."""
    return f"{_article(_thing(scene, {}, ''))} on {_article(scene.background)} background"


def _thing(scene: Scene, said: dict[str, str], color: str) -> str:
    """The noun with its colour and the phrases that read best next to it, which are removed from `said`."""
    bare = {name: _bare(phrase) for name, phrase in said.items()}
    kind = KINDS[scene.kind]
    noun = kind.noun
    if scene.kind == "sprouts":
        pot = f"{color} {noun}".strip()
        return f"{bare['plant']} in {_article(pot)}" if said.pop("plant", "") else f"plant in {_article(pot)}"
    if scene.kind == "voxel-art" and color:  # its colour is that of its hair or hat
        hats = {kind.phrases["top"][variant] for variant in kind.hats}
        top = said.get("top", "a hat" if scene.phrases["top"] in hats else "hair")
        said["top"] = _article(f"{color} {_bare(top)}") if top != _bare(top) else f"{color} {top}"
    if scene.kind == "voxel-art":
        return noun
    if scene.kind == "moods":
        shape = bare["face"].removesuffix(" shape") if said.pop("face", "") else ""
        return " ".join(word for word in (color, shape, noun) if word)
    return f"{color} {noun}".strip()


def _word(table: dict[str, str], color: str) -> str:
    return next(word for word, value in table.items() if value == color)


def _bare(phrase: str) -> str:
    return phrase.removeprefix("a ").removeprefix("an ")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listing(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
