"""`flashdiff evaluate`: opens the models and images that its options name, measures every subject, and writes the report."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flashdiff import defaults
from flashdiff.components import Components, ModelSpec
from flashdiff.errors import ConfigError, EvaluationError, RequestError, first_line
from flashdiff.evaluation.evaluate import (
    Evaluator,
    Report,
    Subject,
    make_images,
    markdown,
    measure,
    warnings_for,
    write_sheets,
)
from flashdiff.evaluation.features import check_features, check_scorer, dino, feature_extractor, second_extractor, text_scorer
from flashdiff.evaluation.identity import ReferredData, check_referred, referred_data, referred_prompts, round_trip
from flashdiff.evaluation.images import (
    HELD_OUT,
    REAL,
    WORLD,
    WORLD_SIZE,
    ImageSet,
    Prompt,
    read_images,
    read_prompts,
    read_reference,
    real_images,
    write_images,
)
from flashdiff.evaluation.protocols import CLIP, Meter, protocol_of, protocol_table, read_coco, run_protocol
from flashdiff.evaluation.tasks import REFERRED, TaskData, check_name, check_task, parameter_option, task_data
from flashdiff.families.base import TorchModel
from flashdiff.files import check_target, new_folder, write_whole
from flashdiff.lora import find_lora, fused_spec, load_fused, read_flash_info
from flashdiff.reading import read_json
from flashdiff.samplers.options import SamplingOptions
from flashdiff.tasks import check_order

MANIFEST = "manifest.json"
"""What a folder has that is a bundle."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """The command's options; `flashdiff evaluate --help` describes them."""

    subject: str
    variant: str | None = None
    """Of the subject where it is a base, as `config` and `vae` are: the options of `build-engine`."""
    config: str | None = None
    vae: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    steps: tuple[int, ...] = ()
    teacher: str | None = None
    teacher_steps: tuple[int, ...] = defaults.TEACHER_STEPS
    guidance: float | None = None
    """Of the teacher, or of the subject where no teacher is named; None: what the subject's flash LoRA was trained at, or the
    family's. Up to 1: none."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How the subject is sampled, but for its guidance."""
    prompts: str = defaults.PROMPTS
    count: int = defaults.PROMPT_COUNT
    seeds: int = defaults.IMAGES_PER_PROMPT
    reference: str = defaults.REFERENCE
    reference_count: int = defaults.REFERENCE_COUNT
    features: str | None = None
    text: str | None = None
    json_file: Path | None = None
    out: Path | None = None
    protocol: str | None = None
    """One of `protocols.PROTOCOLS`: prompts, sizes and scores are then its own."""
    scores: tuple[str, ...] = ()
    """Further text scorers of a protocol."""
    task: str | None = None
    """Another one than text to image, with `parameters` and the originals in the folder or shards `images`; without those, the
    prompts are of the embedded world, and its renderer draws the originals."""
    parameters: tuple[tuple[str, float], ...] = ()
    images: str | None = None


def evaluate(options: EvaluateOptions, *, open_bundle: Callable[[Path], Components], report: Callable[[str], None]) -> str:
    """Measure and write what the options ask for; the Markdown report."""
    _check_task_options(options)
    if options.teacher_steps != defaults.TEACHER_STEPS and not options.teacher:
        raise ConfigError(f"--teacher-steps {','.join(map(str, options.teacher_steps))}: it is for --teacher; give one")
    if options.json_file and not (options.out and options.json_file.resolve().is_relative_to(options.out.resolve())):
        try:  # a file in the folder --out is checked with that
            check_target(options.json_file)
        except OSError as error:
            raise ConfigError(f"--json {options.json_file}: cannot be written: {error.strerror}") from None
    if options.protocol:
        return _evaluate_protocol(options, open_bundle=open_bundle, report=report)
    if options.scores:
        raise ConfigError(
            f"--scores {','.join(options.scores)}: it is for --protocol; without it, give a score as --text, or "
            "dino as --features"
        )
    of_world = options.reference == WORLD
    if options.prompts not in (WORLD, HELD_OUT) and of_world:
        raise ConfigError("--prompts names a file: name a --reference too, a folder of real images or webdataset shards")
    features_name = options.features or ("avatars" if of_world else "inception")
    scorer_name = options.text or ("avatars" if of_world else None)
    check_features(features_name)  # the networks themselves, which may be downloaded, come after the models
    if scorer_name:
        check_scorer(scorer_name)
    with _as_options(dict(options.parameters)):
        selection = _select(options, open_bundle, report)
    reference = read_reference(options.reference, options.reference_count, WORLD_SIZE)
    if not selection.task and not selection.is_drawable:
        selection.real, reference = _real_part(reference, selection.count)
    features, second = feature_extractor(features_name), second_extractor(features_name)
    scorer = text_scorer(scorer_name) if scorer_name else None
    report(f"reference: {options.reference}, {len(reference)} images")
    with new_folder(options.out) if options.out else nullcontext() as folder:
        evaluator = Evaluator(features, scorer, reference, second)
        measurements = []
        for subject in _subjects(selection, report):
            measurement, which = measure(subject, evaluator)
            measurements.append(measurement)
            report(f"{measurement.name}: FID {measurement.fid}, KID {measurement.kid}")
            if folder:
                write_sheets(folder / "sheets", subject, which, reference)
                write_images(subject.images, folder / "images" / subject.images.name)
        result = Report(
            features=features.name,
            second_features=second.name if second else None,
            feature_dimension=features.dimension,
            resize=features.resize,
            text_scorer=scorer.name if scorer else None,
            reference=options.reference,
            reference_images=len(reference),
            rows=tuple(measurements),
            warnings=warnings_for(evaluator, [measurement.images for measurement in measurements]),
        )
        if folder:
            write_whole(folder / "report.md", markdown(result) + "\n")
    if options.json_file:
        write_whole(options.json_file, result.model_dump_json(indent=2) + "\n")
    return markdown(result)


def _evaluate_protocol(
    options: EvaluateOptions, *, open_bundle: Callable[[Path], Components], report: Callable[[str], None]
) -> str:
    """Measure after papers' tables; the table. What --out keeps lets the same command go on after a kill."""
    protocol = protocol_of(options.protocol or "")
    for name, default in (("count", defaults.PROMPT_COUNT), ("seeds", defaults.IMAGES_PER_PROMPT),
                          ("reference_count", defaults.REFERENCE_COUNT)):  # fmt: skip
        if getattr(options, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: {protocol.name} settles it; leave it out")
    if options.prompts == defaults.PROMPTS or options.reference == defaults.REFERENCE:
        raise ConfigError(
            f"--protocol {protocol.name}: give --prompts captions_val20XX.json and --reference FOLDER, the images of COCO's "
            "validation set"
        )
    if _holds_images(Path(options.subject)):
        raise ConfigError(f"{options.subject} is a folder of images: --protocol {protocol.name} is for models")
    dinos = [name for name in options.scores if name.partition(":")[0] == "dino"]
    if len(dinos) > 1:
        raise ConfigError(f"--scores {','.join(options.scores)}: give dino once")
    check_features(options.features or "inception")
    check_scorer(options.text or CLIP)
    for name in options.scores:
        if name not in dinos:
            check_scorer(name, "--scores")
    coco = read_coco(protocol, Path(options.prompts), Path(options.reference))
    loras = tuple((find_lora(name), weight) for name, weight in options.loras)
    sampling = options.sampling.model_copy(update={"guidance": None if options.teacher else options.guidance})
    title = " + ".join([Path(options.subject).resolve().name, *(folder.name for folder, _ in loras)])
    opened = [(title, _open_subject(options, loras, sampling, open_bundle), options.steps)]
    if options.teacher:
        teacher = _open_teacher(options, options.teacher, loras, open_bundle, report)
        opened.append((Path(options.teacher).resolve().name, teacher, options.teacher_steps))
    models = [(name, model, count) for name, model, steps in opened for count in steps or (model.spec.sampler.default_steps,)]
    for _, model, count in models:
        check_order(model.spec, prompt=coco.captions[0], steps=count, truncate_prompt=True)
    meter = Meter(
        protocol=protocol,
        features=feature_extractor(options.features or "inception"),
        scorers=(
            text_scorer(options.text or CLIP),
            *(text_scorer(name, "--scores") for name in options.scores if name not in dinos),
        ),
        diversity=dino(dinos[0].partition(":")[2], "--scores dino") if dinos else None,
        keep=options.out / "features" if options.out else None,
        report=report,
    )
    found = run_protocol(meter, coco, models)
    if options.out:
        write_whole(options.out / "report.md", protocol_table(found) + "\n")
    if options.json_file:
        write_whole(options.json_file, found.model_dump_json(indent=2) + "\n")
    return protocol_table(found)


@dataclass
class _Selection:
    """What will be measured: images that exist, and models with the numbers of steps they make images in."""

    prompts: list[Prompt]
    seeds: int
    made: ImageSet | None = None
    models: list[tuple[str, Components, int]] = field(default_factory=list)
    real: ImageSet | None = None
    task: TaskData | None = None

    @property
    def count(self) -> int:
        """How many images each subject has."""
        return len(self.made) if self.made else len(self.prompts) * self.seeds

    @property
    def is_drawable(self) -> bool:
        """Whether the renderer can draw the prompts."""
        return bool(self.prompts) and all(prompt.scene for prompt in self.prompts)


def _select(options: EvaluateOptions, open_bundle: Callable[[Path], Components], report: Callable[[str], None]) -> _Selection:
    """Open everything and check every prompt with every model, so that a mistake shows before the first image."""
    opened: list[tuple[str, Components, tuple[int, ...]]] = []
    loras: tuple[tuple[Path, float], ...] = ()
    if _holds_images(Path(options.subject)):
        if options.task:
            raise ConfigError(f"--task {options.task}: {options.subject} is a folder of images; it is for models")
        _refuse_model_options(options)
        _refuse_base_options(options, "a folder of images")
        made = read_images(Path(options.subject))
        prompts = list(dict.fromkeys(prompt for prompt in made.prompts if prompt))
        selection = _Selection(prompts, len(made) // max(1, len(prompts)), made)
    else:
        selection = _select_requests(options)
        loras = tuple((find_lora(name), weight) for name, weight in options.loras)
        name = " + ".join([Path(options.subject).resolve().name, *(folder.name for folder, _ in loras)])
        guidance = None if options.teacher else options.guidance
        sampling = options.sampling.model_copy(update={"guidance": guidance})
        opened.append((name, _open_subject(options, loras, sampling, open_bundle), options.steps))
    if options.teacher:
        if not selection.prompts:
            raise ConfigError(
                f"{options.subject} has no prompts that the teacher could draw: give each image a caption (metadata.jsonl or "
                ".txt), or leave out --teacher"
            )
        components = _open_teacher(options, options.teacher, loras, open_bundle, report)
        opened.append((Path(options.teacher).resolve().name, components, options.teacher_steps))

    taken = {REAL, selection.made.name if selection.made else REAL}
    for name, components, steps in opened:
        if options.task:
            if options.task in REFERRED:
                check_referred(options.task, components.spec, name)
            else:
                check_task(options.task, components.spec, name, dict(options.parameters))
        for count in steps or (components.spec.sampler.default_steps,):
            for prompt in selection.prompts:
                _check_request(components.spec, prompt, count, selection.task)
            title = f"{name}, {count} step{'s' if count > 1 else ''}"
            while title in taken:
                title += " (again)"
            taken.add(title)
            selection.models.append((title, components, count))
        for prompt in selection.prompts:
            components.tokenize([prompt.text])  # refuses what is too long
    return selection


@contextmanager
def _as_options(parameters: Mapping[str, float]) -> Iterator[None]:
    """Within the block a RequestError about one of these numbers is a ConfigError that names its option."""
    try:
        yield
    except RequestError as error:
        name = (error.field or "").removeprefix("controls.").removesuffix(".scale")
        if name not in parameters:
            raise
        raise ConfigError(f"{parameter_option(name, parameters[name])}: {error.allowed}") from None


def _check_request(spec: ModelSpec, prompt: Prompt, steps: int, task: TaskData | None) -> None:
    """RequestError for what the model cannot do; of a task's images ConfigError, which says whose they are."""
    if task is None:
        check_order(spec, prompt=prompt.text, steps=steps)
        return
    try:
        check_order(spec, prompt=prompt.text, steps=steps, **task.requests[0])
    except RequestError as error:
        if error.field not in (*task.inputs[0], *(f"controls.{name}.image" for name in task.controls)):
            raise
        raise ConfigError(f"--task: {error}; the images are made of --images, or drawn with {WORLD_SIZE} pixels") from None


def _check_task_options(options: EvaluateOptions) -> None:
    """ConfigError for options of a task without one, and for a task whose originals are not known."""
    if options.protocol and options.task:
        raise ConfigError(
            f"--task {options.task}: --protocol {options.protocol} measures text to image alone; leave one of them out"
        )
    if options.task:
        check_name(options.task)
    if options.task is None:
        if options.images or options.parameters:
            given = f"--images {options.images}" if options.images else parameter_option(*options.parameters[0])
            raise ConfigError(f"{given}: it is for --task; give one")
    elif options.images and options.task in REFERRED:
        raise ConfigError(f"--images {options.images}: the pictures of --task {options.task} are drawn; leave it out")
    elif options.images:
        if options.reference == WORLD or options.prompts != defaults.PROMPTS or options.seeds != defaults.IMAGES_PER_PROMPT:
            raise ConfigError(
                f"--images {options.images}: its captions are the prompts, an image each; give --reference, a folder of other "
                "images, and neither --prompts nor --seeds"
            )
    elif options.task in REFERRED and options.prompts not in (WORLD, HELD_OUT):
        raise ConfigError(f"--prompts {options.prompts}: --task {options.task} is for {WORLD} or {HELD_OUT}")
    elif options.prompts not in (WORLD, HELD_OUT):
        raise ConfigError(f"--task {options.task}: give --images, a folder of images with captions, in place of --prompts")


def _select_requests(options: EvaluateOptions) -> _Selection:
    """The prompts, and for a task the originals that they describe with the inputs made from them."""
    if options.images:
        originals = read_images(Path(options.images), options.count)
        prompts = [prompt for prompt in originals.prompts if prompt and prompt.text.strip()]
        if len(prompts) < len(originals):
            raise ConfigError(f"--images {options.images}: {len(originals) - len(prompts)} images have no caption")
        selection = _Selection(prompts, 1, real=replace(originals, name=REAL))
    else:
        prompts = read_prompts(options.prompts, options.count)
        if options.task in REFERRED:
            prompts = referred_prompts(options.task, prompts)
        selection = _Selection(prompts, options.seeds)
        if options.task:
            selection.real = real_images(selection.prompts, selection.seeds, WORLD_SIZE)
    if options.task and selection.real:
        data_of = referred_data if options.task in REFERRED else task_data
        selection.task = data_of(options.task, selection.real, dict(options.parameters))
    return selection


def _subjects(selection: _Selection, report: Callable[[str], None]) -> Iterator[Subject]:
    """The real images, then the subject's, then its teacher's."""
    real, task = selection.real or real_images(selection.prompts, selection.seeds, WORLD_SIZE), selection.task
    if isinstance(task, ReferredData):
        decoded = round_trip(selection.models[0][1], real)
        yield from (Subject(images, of_task=task.numbers_of(images)) for images in (real, decoded))
    else:
        yield Subject(real)
    if task and task.unchanged:
        yield Subject(task.unchanged, of_task=task.numbers_of_input)
    if selection.made:
        name = selection.made.name if selection.made.name != REAL else f"{REAL} (subject)"
        yield Subject(replace(selection.made, name=name))
    for title, components, steps in selection.models:
        yield make_images(
            components,
            selection.prompts,
            seeds=selection.seeds,
            steps=steps,
            name=title,
            report=report,
            task=task,
        )


def _real_part(reference: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """A reference that no renderer can draw more of, in two parts: the real row, and the reference of every subject.

    The real row has as many images as a subject, `count`, because a Frechet distance depends on it; at most half.
    """
    if len(reference) < 4:
        raise EvaluationError(f"the reference holds {len(reference)} images; give at least 4")
    order = np.random.default_rng(0).permutation(len(reference))
    real = max(2, min(count, len(reference) // 2))
    return reference.part(order[:real], REAL), reference.part(order[real:], reference.name)


def _refuse_model_options(options: EvaluateOptions) -> None:
    """ConfigError for what says how images are made, where the subject is a folder of images."""
    given = {
        "--lora": options.loras,
        "--steps": options.steps,
        "--sampler or an option of its group": options.sampling != SamplingOptions(),
        "--guidance without --teacher": options.guidance is not None and not options.teacher,
        "--prompts": options.prompts != defaults.PROMPTS,
        "--count": options.count != defaults.PROMPT_COUNT,
        "--seeds": options.seeds != defaults.IMAGES_PER_PROMPT,
    }
    if found := next((name for name, is_given in given.items() if is_given), None):
        raise ConfigError(f"{options.subject} is a folder of images: {found} is for models; leave it out")


def _refuse_base_options(options: EvaluateOptions, subject: str) -> None:
    given = next(((name, value) for name in ("variant", "config", "vae") if (value := getattr(options, name))), None)
    if given:
        raise ConfigError(f"--{given[0]} {given[1]}: it is for a base, and {options.subject} is {subject}; leave it out")


def _holds_images(path: Path) -> bool:
    is_model = (path / "model_index.json").exists() or (path / MANIFEST).exists()
    return path.suffix == ".tar" or (path.is_dir() and not is_model)


def _is_checkpoint(name: str) -> bool:
    return Path(name).suffix == ".pt" and Path(name).is_file()


def _open_subject(
    options: EvaluateOptions,
    loras: Sequence[tuple[Path, float]],
    sampling: SamplingOptions,
    open_bundle: Callable[[Path], Components],
) -> Components:
    if (Path(options.subject) / MANIFEST).exists():
        _refuse_base_options(options, "a bundle")
    if _is_checkpoint(options.subject):
        _refuse_base_options(options, "a checkpoint of a distillation")
    files = {"variant": options.variant, "config": options.config, "vae": options.vae}
    return _open(options.subject, loras, sampling, open_bundle, **files)


def _open_teacher(
    options: EvaluateOptions,
    name: str,
    loras: Sequence[tuple[Path, float]],
    open_bundle: Callable[[Path], Components],
    report: Callable[[str], None],
) -> Components:
    """The teacher, by default at the middle of the guidance that the subject was trained with."""
    teacher = _open(name, (), SamplingOptions(guidance=options.guidance), open_bundle)
    if options.guidance is not None or _is_checkpoint(name) or not isinstance(teacher, TorchModel) or not teacher.guides_twice:
        return teacher
    if trained := _trained_guidance(options.subject, loras):
        teacher.spec = fused_spec(teacher.spec, (), SamplingOptions(guidance=statistics.mean(trained)))
        report(f"{name}: guided at {statistics.mean(trained):g}, as the student's teacher was")
    return teacher


def _trained_guidance(subject: str, loras: Sequence[tuple[Path, float]]) -> tuple[float, float] | None:
    """The range of guidance in the run of a checkpoint or of a flash student; None where the subject is neither."""
    if _is_checkpoint(subject):
        recipe = Path(subject).resolve().parent.parent / "recipe.json"
        try:
            low, high = read_json(recipe)["guidance"]
            return float(low), float(high)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise EvaluationError(f"{recipe}: cannot read the guidance of its run ({first_line(error)})") from None
    places = [Path(subject), *(lora for lora, _ in loras)]
    return next((info.guidance for place in places if (info := read_flash_info(place))), None)


def _open(
    name: str,
    loras: Sequence[tuple[Path, float]],
    sampling: SamplingOptions,
    open_bundle: Callable[[Path], Components],
    **files: str | None,
) -> Components:
    """A bundle, a checkpoint of a distillation, or a base model in torch with its LoRAs fused; `files` say which of the base's
    are read."""
    if _is_checkpoint(name):
        if loras or sampling != SamplingOptions():
            raise ConfigError(f"{name} is a checkpoint of a distillation: its run settles how it is sampled; leave out --lora, "
                              "--guidance without --teacher, --sampler and its group")  # fmt: skip
        return open_bundle(Path(name))
    if not (Path(name) / MANIFEST).exists():
        return load_fused(name, loras, sampling, **files)[1]
    if loras or sampling.guidance is not None:
        raise ConfigError(f"{name} is a bundle: --lora and --guidance are settled when it is built")
    if sampling != SamplingOptions():
        raise ConfigError(f"{name} is a bundle: its sampler was set when it was built; leave out --sampler and its group")
    return open_bundle(Path(name))
