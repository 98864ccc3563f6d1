"""`flashdiff evaluate`: opens what its options name, measures every subject, writes what was asked for."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashdiff.components import Components
from flashdiff.errors import ConfigError, EvaluationError
from flashdiff.evaluation.evaluate import (
    Report,
    Row,
    Subject,
    Yardstick,
    make_images,
    markdown,
    measure,
    warnings_for,
    write_sheets,
)
from flashdiff.evaluation.features import FeatureExtractor, TextScorer, feature_extractor, text_scorer
from flashdiff.evaluation.images import (
    HELD_OUT,
    REAL,
    WORLD,
    ImageSet,
    read_images,
    read_prompts,
    read_reference,
    real_images,
    write_images,
)
from flashdiff.files import new_folder, write_whole
from flashdiff.generate import check_order
from flashdiff.lora import find_lora, load_fused

_WORLD_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The command's options, as `flashdiff evaluate --help` tells them."""

    subject: str
    loras: tuple[tuple[str, float], ...] = ()
    steps: tuple[int, ...] = ()
    teacher: str | None = None
    teacher_steps: tuple[int, ...] = (50,)
    guidance: float | None = None
    prompts: str = WORLD
    count: int = 500
    seeds: int = 2
    reference: str = WORLD
    reference_count: int = 5000
    features: str | None = None
    text: str | None = None
    json_file: Path | None = None
    out: Path | None = None


def evaluate(options: EvaluateOptions, *, open_bundle: Callable[[Path], Components], report: Callable[[str], None]) -> str:
    """Measure and write what the options ask for; the Markdown report."""
    is_world = options.prompts in (WORLD, HELD_OUT)
    if not is_world and options.reference == WORLD:
        raise ConfigError("--prompts names a file: name a --reference too, a folder of real images or webdataset shards")
    features = feature_extractor(options.features or ("avatars" if is_world else "inception"))
    scorer_name = options.text or ("avatars" if is_world else None)
    scorer = text_scorer(scorer_name) if scorer_name else None
    subjects = _subjects(options, report, open_bundle)
    reference = read_reference(options.reference, options.reference_count, _WORLD_SIZE)
    report(f"reference: {options.reference}, {len(reference)} images")
    yardstick = Yardstick(features, scorer, reference)

    with new_folder(options.out) if options.out else nullcontext() as folder:
        rows = []
        for subject in subjects:
            row, which = measure(subject, yardstick)
            rows.append(row)
            report(f"{row.name}: FID {row.fid}, KID {row.kid}")
            if folder:
                write_sheets(folder / "sheets", subject, which, reference)
                write_images(subject.images, folder / "images" / subject.images.name)
        if not any(row.name == REAL for row in rows):
            rows.insert(0, _floor(reference, features, scorer))
        result = Report(
            features=features.name,
            feature_dimension=features.dimension,
            resize=features.resize,
            text_scorer=scorer.name if scorer else None,
            reference=options.reference,
            reference_images=len(reference),
            rows=tuple(rows),
            warnings=warnings_for(yardstick, [row.images for row in rows]),
        )
        if folder:
            write_whole(folder / "report.md", markdown(result) + "\n")
    if options.json_file:
        write_whole(options.json_file, result.model_dump_json(indent=2) + "\n")
    return markdown(result)


def _subjects(
    options: EvaluateOptions, report: Callable[[str], None], open_bundle: Callable[[Path], Components]
) -> Iterator[Subject]:
    """The real images where the prompts can be drawn, then the subject, then its teacher. All mistakes show at once."""
    models = []
    made = read_images(Path(options.subject)) if _holds_images(Path(options.subject)) else None
    if made is None:
        prompts, seeds = read_prompts(options.prompts, options.count), options.seeds
        loras = tuple((find_lora(name), weight) for name, weight in options.loras)
        name = " + ".join([Path(options.subject).name, *(folder.name for folder, _ in loras)])
        models.append((name, _open(options.subject, loras, options.guidance, open_bundle), options.steps))
    else:
        if options.loras or options.steps:
            raise ConfigError(f"{options.subject} is a folder of images: --lora and --steps are for models")
        prompts = list(dict.fromkeys(prompt for prompt in made.prompts if prompt))
        seeds = len(made) // max(1, len(prompts))
    if options.teacher:
        if not prompts:
            raise ConfigError(f"{options.subject} tells no prompts, so the teacher has none to draw: see metadata.jsonl in docs")
        components = _open(options.teacher, (), options.guidance, open_bundle)
        models.append((Path(options.teacher).name, components, options.teacher_steps))

    for _, components, steps in models:
        for count in steps:
            check_order(components.spec, prompt="any", steps=count)

    def drawn() -> Iterator[Subject]:
        if prompts and all(prompt.scene for prompt in prompts):
            yield Subject(real_images(prompts, seeds, _WORLD_SIZE))
        if made:
            yield Subject(made)
        for name, components, steps in models:
            for count in steps or (components.spec.sampler.default_steps,):
                title = f"{name}, {count} step{'s' if count > 1 else ''}"
                yield make_images(components, prompts, seeds=seeds, steps=count, name=title, report=report)

    return drawn()


def _holds_images(path: Path) -> bool:
    is_model = (path / "model_index.json").exists() or (path / "manifest.json").exists()
    return path.suffix == ".tar" or (path.is_dir() and not is_model)


def _open(
    name: str, loras: Sequence[tuple[Path, float]], guidance: float | None, open_bundle: Callable[[Path], Components]
) -> Components:
    """A bundle, or a base model in torch with its LoRAs fused."""
    if not (Path(name) / "manifest.json").exists():
        return load_fused(name, loras, guidance)[1]
    if loras:
        raise ConfigError(f"{name} is a bundle: its LoRAs are fused already")
    return open_bundle(Path(name))


def _floor(reference: ImageSet, features: FeatureExtractor, scorer: TextScorer | None) -> Row:
    """Real against real: one half of the reference against the other."""
    half = len(reference) // 2
    if half < 2:
        raise EvaluationError(f"the reference holds {len(reference)} images; give at least 4")
    order = np.random.default_rng(0).permutation(len(reference))
    first, second = order[:half], order[half:]
    return measure(Subject(reference.part(first, REAL)), Yardstick(features, scorer, reference.part(second, "other half")))[0]
