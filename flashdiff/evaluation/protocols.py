"""Protocols on COCO after those of papers, named: which prompts of COCO, against which images, at which size, by which networks.

Images are measured a chunk at a time and never kept, so that 30,000 of them take no more memory than a thousand.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flashdiff.components import Components
from flashdiff.config import Record
from flashdiff.errors import ConfigError, EvaluationError, first_line
from flashdiff.evaluation.features import FeatureExtractor, TextScorer
from flashdiff.evaluation.metrics import Moments, frechet_distance
from flashdiff.files import write_whole
from flashdiff.generate import generate
from flashdiff.orders import Pixels
from flashdiff.pictures import read_rgb
from flashdiff.reading import open_file, read_file, read_json
from flashdiff.tasks import check_order

PATCH = 299
"""Side of the patch in the middle that patch-FID looks at (SDXL-Lightning, 2402.13929): details that resizing to 256 hides."""
CLIP = "clip:laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
"""The default text scorer. It reads captions as they are; DMD2 puts "A photo depicts " before them."""
_CHUNK = 500
_DIVERSITY_PROMPTS, _DIVERSITY_SEEDS = 200, 5


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to measure a text-to-image model on COCO."""

    name: str
    prompts: int
    """How many images are made, each from a caption of another image of the validation set."""
    size: int
    """Side in pixels that both sides are cropped and resized to before the feature network resizes them itself."""


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(name="coco2014-30k", prompts=30_000, size=256),
        Protocol(name="coco2014-10k", prompts=10_000, size=256),
        Protocol(name="coco2017-5k", prompts=5_000, size=512),
    )
}


@dataclass(frozen=True, kw_only=True)
class Coco:
    """A validation set: the captions to draw, and the files of all its images."""

    captions: tuple[str, ...]
    files: tuple[Path, ...]

    @property
    def prompts_hash(self) -> str:
        """Names the list of prompts."""
        return hashlib.sha256("\n".join(self.captions).encode()).hexdigest()[:12]


def protocol_of(name: str) -> Protocol:
    """The protocol of that name; ConfigError for any other."""
    if name not in PROTOCOLS:
        raise ConfigError(f"--protocol {name}: choose {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def read_coco(protocol: Protocol, annotations: Path, folder: Path) -> Coco:
    """The protocol's captions from COCO's `captions_val20XX.json`, and the images that it lists, in `folder`.

    Each image gives its caption with the lowest id. Which images give one is settled by the hash of their ids, so the list is the
    same everywhere. EvaluationError where something is missing.
    """
    try:
        values = read_json(annotations)
        names = {int(image["id"]): str(image["file_name"]) for image in values["images"]}
        captions: dict[int, tuple[int, str]] = {}
        for entry in values["annotations"]:
            said = (int(entry["id"]), " ".join(str(entry["caption"]).split()))
            if not said[1]:
                continue
            captions[int(entry["image_id"])] = min(said, captions.get(int(entry["image_id"]), said))
    except OSError as error:
        raise EvaluationError(f"--prompts {annotations}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(f"--prompts {annotations}: no captions file of COCO ({first_line(error)})") from None
    chosen = sorted(captions, key=lambda number: hashlib.sha256(str(number).encode()).digest())[: protocol.prompts]
    if len(chosen) < protocol.prompts:
        raise EvaluationError(
            f"--prompts {annotations}: {protocol.name} needs captions of {protocol.prompts} images, the file has {len(chosen)}"
        )
    missing = [name for name in names.values() if not (folder / name).is_file()]
    if missing:
        raise EvaluationError(
            f"--reference {folder}: {len(missing)} of the {len(names)} images that {annotations.name} lists are not there, "
            f"the first: {missing[0]}"
        )
    return Coco(
        captions=tuple(captions[number][1] for number in chosen), files=tuple(folder / names[number] for number in sorted(names))
    )


# --- images ----------------------------------------------------------------------------------------------------------


def resized(image: Pixels, size: int) -> Pixels:
    """The square in the middle of an image [H, W, 3] at `size`, by PIL's Lanczos filter."""
    return np.asarray(ImageOps.fit(Image.fromarray(image), (size, size), Image.Resampling.LANCZOS))


def middle_patch(image: Pixels) -> Pixels:
    """The patch in the middle of an image [H, W, 3], not resized; of an image that is smaller, its largest square enlarged."""
    height, width = image.shape[:2]
    if min(height, width) < PATCH:
        return resized(image, PATCH)
    top, left = (height - PATCH) // 2, (width - PATCH) // 2
    return image[top : top + PATCH, left : left + PATCH]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is kept of images: features of them and of their patches, and the mean of every score."""

    whole: NDArray[np.float32]  # [N, D]
    patches: NDArray[np.float32]  # [N, D]
    scores: NDArray[np.float32]  # [N, scorers]


@dataclass(frozen=True, kw_only=True)
class Meter:
    """The networks of a run of a protocol."""

    protocol: Protocol
    features: FeatureExtractor
    scorers: tuple[TextScorer, ...]
    diversity: FeatureExtractor | None = None
    """Features whose distances between images of one prompt are measured; None: none are."""
    keep: Path | None
    """A folder where measured chunks stay, so that a killed run goes on; None: nowhere."""
    report: Callable[[str], None]

    def measure_model(self, components: Components, coco: Coco, *, steps: int, name: str) -> tuple[Measured, float | None]:
        """Images of all captions, image i from seed i; and the diversity, where it is measured."""

        def make(start: int, end: int) -> tuple[list[Pixels], Sequence[str]]:
            texts = coco.captions[start:end]
            orders = [
                check_order(components.spec, prompt=text, seed=seed, steps=steps, truncate_prompt=True)
                for seed, text in enumerate(texts, start=start)
            ]
            return [image for images in generate(components, orders) for image in images], texts

        # Another model of the same name draws another image.
        drawn = hashlib.sha256(make(0, 1)[0][0].tobytes()).hexdigest()[:12] if self.keep else ""
        found = self._in_chunks(len(coco.captions), make, _title(name, steps), f"{coco.prompts_hash} {drawn}", with_scores=True)
        if self.diversity is None:
            return found, None
        mark = f"{_title(name, steps)} {coco.prompts_hash} {drawn} {self.diversity.name}"
        return found, self._kept_number(mark, lambda: self._diversity(components, coco, steps))

    def _kept_number(self, mark: str, measure: Callable[[], float]) -> float:
        file = self._file(mark, with_scores=False)
        if file and (file := file.with_suffix(".txt")).exists():
            with suppress(ValueError):  # a damaged file
                return float(file.read_text())
        found = measure()
        if file:
            write_whole(file, repr(found))
        return found

    def _diversity(self, components: Components, coco: Coco, steps: int) -> float:
        """100 times the mean cosine distance between images of one prompt, over the first captions."""
        assert self.diversity
        distances = []
        for number, text in enumerate(coco.captions[:_DIVERSITY_PROMPTS]):
            seeds = [number + len(coco.captions) * again for again in range(_DIVERSITY_SEEDS)]
            orders = [check_order(components.spec, prompt=text, seed=seed, steps=steps, truncate_prompt=True) for seed in seeds]
            features = self.diversity(np.stack([image for images in generate(components, orders) for image in images]))
            unit = features / np.linalg.norm(features, axis=1, keepdims=True)
            distances.append(1 - (unit @ unit.T)[np.triu_indices(len(unit), 1)].mean())
        return 100 * float(np.mean(distances))

    def measure_real(self, coco: Coco) -> Measured:
        """The real images, without scores: their captions are not of interest here."""

        def read(start: int, end: int) -> tuple[list[Pixels], Sequence[str]]:
            return [_read(file) for file in coco.files[start:end]], ()

        return self._in_chunks(len(coco.files), read, "real", _mark(coco.files), with_scores=False)

    def _in_chunks(
        self,
        count: int,
        make: Callable[[int, int], tuple[list[Pixels], Sequence[str]]],
        name: str,
        mark: str,
        *,
        with_scores: bool,
    ) -> Measured:
        found: list[Measured] = []
        for start in range(0, count, _CHUNK):
            end = min(start + _CHUNK, count)
            file, kept = self._file(f"{name} {mark} {start} {end}", with_scores), None
            if file and file.exists():
                kept = _load(file)
            if kept is None:
                kept = self._measure(*make(start, end))
                if file:
                    values = vars(kept)
                    write_whole(file, lambda opened, values=values: np.savez(opened, **values))  # type: ignore[misc]
            found.append(kept)
            self.report(f"{name}: {end} of {count} images")
        joined = {key: np.concatenate([getattr(part, key) for part in found]) for key in ("whole", "patches", "scores")}
        return Measured(**joined)

    def _file(self, name: str, with_scores: bool) -> Path | None:
        networks = [self.features.name, *(scorer.name for scorer in self.scorers if with_scores)]
        digest = hashlib.sha256(" ".join([str(self.protocol.size), *networks, name]).encode()).hexdigest()
        return self.keep / f"{digest[:32]}.npz" if self.keep else None

    def _measure(self, images: list[Pixels], texts: Sequence[str]) -> Measured:
        whole = self.features(np.stack([resized(image, self.protocol.size) for image in images]))
        patches = self.features(np.stack([middle_patch(image) for image in images]))
        scores = [scorer(np.stack(images), texts) for scorer in self.scorers] if texts else []
        columns = np.stack(scores, axis=1) if scores else np.zeros((len(images), 0))
        return Measured(whole=whole, patches=patches, scores=columns.astype(np.float32))


def _title(name: str, steps: int) -> str:
    return f"{name}, {steps} step{'s' if steps > 1 else ''}"


def _load(file: Path) -> Measured | None:
    """A chunk that was measured before; None where its file is damaged."""
    try:
        with open_file(file) as opened, np.load(opened) as saved:
            return Measured(**{key: saved[key] for key in ("whole", "patches", "scores")})
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _mark(files: Sequence[Path]) -> str:
    """Names files as they are now: another folder, or one written again, has another mark."""
    states = ((file, file.stat()) for file in files)
    lines = [f"{file.resolve()} {state.st_size} {state.st_mtime_ns}" for file, state in states]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _read(file: Path) -> Pixels:
    try:
        return np.asarray(read_rgb(read_file(file)))
    except Exception as error:  # pillow's errors for damaged files are of many kinds
        raise EvaluationError(f"{file} is not a readable image ({first_line(error)})") from None


# --- the table -------------------------------------------------------------------------------------------------------


class ProtocolRow(Record):
    """A line of a paper's table."""

    name: str
    steps: int
    fid: float
    patch_fid: float
    scores: dict[str, float]
    """The mean of every scorer by its name."""
    diversity: float | None
    """100 times the mean cosine distance between images of one prompt; None where it was not measured."""


class ProtocolReport(Record):
    """All lines, and what they were made with."""

    protocol: str
    prompts: int
    prompts_hash: str
    reference_images: int
    size: int
    features: str
    resize: str
    diversity: str | None
    """The features of its column."""
    rows: tuple[ProtocolRow, ...]


def run_protocol(meter: Meter, coco: Coco, models: Sequence[tuple[str, Components, int]]) -> ProtocolReport:
    """Measure every (name, model, steps) against the real images."""
    real = meter.measure_real(coco)
    whole, patches = Moments.of(real.whole), Moments.of(real.patches)
    del real
    rows = []
    for name, components, steps in models:
        found, diversity = meter.measure_model(components, coco, steps=steps, name=name)
        means = {scorer.name: float(mean) for scorer, mean in zip(meter.scorers, found.scores.mean(axis=0), strict=True)}
        fid, patch_fid = frechet_distance(Moments.of(found.whole), whole), frechet_distance(Moments.of(found.patches), patches)
        rows.append(ProtocolRow(name=name, steps=steps, fid=fid, patch_fid=patch_fid, scores=means, diversity=diversity))
        meter.report(f"{_title(name, steps)}: FID {fid:.2f}, patch-FID {patch_fid:.2f}")
    return ProtocolReport(
        protocol=meter.protocol.name,
        prompts=len(coco.captions),
        prompts_hash=coco.prompts_hash,
        reference_images=len(coco.files),
        size=meter.protocol.size,
        features=meter.features.name,
        resize=meter.features.resize,
        diversity=meter.diversity.name if meter.diversity else None,
        rows=tuple(rows),
    )


def protocol_table(report: ProtocolReport) -> str:
    """The report as papers show it: a line for each model and number of steps."""
    scorers = list(report.rows[0].scores) if report.rows else []
    head = ["model", "steps", "FID", "patch-FID", *scorers, *(["DINO diversity"] if report.diversity else [])]
    lines = [head, ["---"] * len(head)]
    for row in report.rows:
        numbers = [row.fid, row.patch_fid, *(row.scores[name] for name in scorers)]
        numbers += [] if row.diversity is None else [row.diversity]
        lines.append([row.name, str(row.steps), *(f"{number:.2f}" for number in numbers)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    diverse = (
        f" Diversity: 100 times the mean cosine distance between {_DIVERSITY_SEEDS} images of a prompt, over the first "
        f"{min(_DIVERSITY_PROMPTS, report.prompts)} prompts, in the features of {report.diversity}."
        if report.diversity
        else ""
    )
    return (
        f"{table}\n\n{report.protocol}: {report.prompts} prompts (list {report.prompts_hash}), one image each, against "
        f"{report.reference_images} real images; both cropped to the square in the middle and resized to {report.size} by PIL's "
        f"Lanczos filter, then as the features want it: {report.resize}. Patch-FID: {PATCH}x{PATCH} in the middle, not resized; "
        f"of a smaller image its largest square, enlarged. Features: {report.features}.{diverse}"
    )
