"""Latency by stage: the student at a few steps against the guided teacher at 50, on the same engine, interleaved in one run.

    python benchmarks/latency.py --base avatars --lora avatars-flash --json latency.json    # every backend that runs here
    python benchmarks/latency.py --student STUDENT_BUNDLE --teacher TEACHER_BUNDLE          # bundles that are there already
    ... --base avatars --lora avatars-flash                                                 # and stock diffusers beside them

`--base` with `--lora` adds what one would use instead: stock diffusers, eager and, where there is a C++ compiler, compiled;
the base must be of Stable Diffusion 1's kind. (Why optimum-intel is not among the alternatives: docs/engines.md.) Several bundles
after --student and --teacher are pairs in order, one a backend.

Every repeat runs each configuration, in turn, so that a noisy machine is noisy for all of them. From prompt to PNG
bytes; `served` is the student behind its server, in a process of its own, as a client sees it. Then each model makes one batch
in a process of its own, for its peak of memory.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import environment, result_file, timed_row
from benchmarks.serving import server
from flashdiff.components import Components
from flashdiff.config import parse_numbers
from flashdiff.engines.bundle import BackendName
from flashdiff.engines.runtime.engine import Engine, open_bundle
from flashdiff.errors import BackendError, BundleError, ConfigError, FlashdiffError, first_line
from flashdiff.files import write_whole
from flashdiff.generate import finish_rows, prepare, unconditional_of
from flashdiff.rows import denoise_rows, start_rows
from flashdiff.server.client import Client
from flashdiff.server.images import encode_image
from flashdiff.tasks import check_order

_BACKENDS: tuple[BackendName, ...] = ("openvino", "onnxruntime", "torch", "tensorrt")  # the first that runs is the main one
STAGES = ("text", "denoise_step", "decode", "image_encoding", "queue", "wire", "total")
_STOCK_PIPELINE = "StableDiffusionPipeline"
PROMPT = "a green monster"  # short: any model takes it, and all pad to the same length

Stages = dict[str, list[float]]
"""Milliseconds of every call of a stage, in one run."""

T = TypeVar("T")


@dataclass(frozen=True)
class Configuration:
    """What is timed: one way to make `batch` images with one number of steps. `once` makes them from a seed."""

    model: str
    backend: str
    precision: str
    steps: int
    batch: int
    nfe: int
    once: Callable[[int], Stages]


Samples = dict[tuple[Configuration, str], list[float]]


def measure(configurations: Sequence[Configuration], repeats: int, report: Callable[[str], None]) -> Samples:
    """Milliseconds by configuration and stage.

    Every time counts the second of two runs: the first takes back caches and cores from the engine that ran before, whose idle
    threads spin for a while.
    """
    samples: Samples = defaultdict(list)
    for index in range(repeats):
        for configuration in configurations:
            configuration.once(index)
            for stage, times in configuration.once(index).items():
                samples[configuration, stage] += times
        if (index + 1) % max(1, repeats // 4) == 0:
            report(f"round {index + 1} of {repeats}")
    return samples


def in_process(model: str, engine: Components, steps: int, batch: int, backend: str, precision: str) -> Configuration:
    """The engine in this process, each stage timed."""
    unconditional = unconditional_of(engine)  # of the empty prompt: a server encodes it once, so it is not part of a request

    def once(seed: int) -> Stages:
        stages: Stages = defaultdict(list)

        def timed(stage: str, work: Callable[[], T]) -> T:
            started = time.perf_counter()
            result = work()
            stages[stage].append(1000 * (time.perf_counter() - started))
            return result

        order = check_order(engine.spec, prompt=PROMPT, seed=seed, steps=steps, count=batch)
        started = time.perf_counter()
        encoded = timed("text", lambda: prepare(engine, engine.spec.text_part.name, [order.prompt])[0])
        rows = start_rows(engine.spec, order, {"prompt": encoded}, unconditional)
        for _ in range(order.steps):
            timed("denoise_step", lambda: denoise_rows(engine, rows))
        images = timed("decode", lambda: finish_rows(engine, rows))
        timed("image_encoding", lambda: [encode_image(image, "png") for image in images])
        stages["total"].append(1000 * (time.perf_counter() - started))
        return stages

    nfe = steps * engine.spec.sampler.evaluations_per_step
    return Configuration(model, backend, precision, steps, batch, nfe, once)


def served(client: Client, steps: int, batch: int, backend: str, precision: str) -> Configuration:
    """The student behind its server: the server's own times, and what the client waits beyond them. Prompts differ, so that the
    server's cache of texts does not help."""

    def once(seed: int) -> Stages:
        prompt = f"{PROMPT} {time.perf_counter_ns()}"
        started = time.perf_counter()
        result = client.generate(prompt, seed=seed, steps=steps, count=batch)
        total = 1000 * (time.perf_counter() - started)
        inside = dict(result.timings)
        wire = total - inside.pop("total")
        step = inside.pop("denoise") / steps
        return {**{stage: [spent] for stage, spent in inside.items()}, "denoise_step": [step], "wire": [wire], "total": [total]}

    return Configuration("student, served", backend, precision, steps, batch, steps, once)


def check_stock(base: str) -> None:
    """ConfigError for a base that `stock_diffusers` has no pipeline for."""
    from flashdiff.families import family_of, find_base

    if (needs := family_of(find_base(base)).pipeline_class) != _STOCK_PIPELINE:
        raise ConfigError(
            f"--base {base} is for a {needs}; stock diffusers is timed with a {_STOCK_PIPELINE} alone: give bundles, --student "
            "and --teacher, without --base"
        )


def stock_diffusers(base: str, lora: Path, *, device: str, compiled: bool) -> Callable[[int, int], Configuration]:
    """Stock diffusers with the same LoRA and times, as its card says: what one would use without flashdiff. float32."""
    import torch
    from diffusers import LCMScheduler, StableDiffusionPipeline

    from flashdiff.families import find_base
    from flashdiff.lora import find_lora, read_flash_info

    folder, adapter = find_base(base), find_lora(str(lora))
    info = read_flash_info(adapter)
    if info is None:
        raise ConfigError(f"--lora {lora}: it has no flash.json, so the times to run it at are not known")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(adapter)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()  # what is fused stays; peft's layers, which cost time at every call, go
    pipeline.to(device)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    if compiled:
        pipeline.unet = torch.compile(pipeline.unet)
    name = "diffusers, compiled" if compiled else "diffusers"

    def configuration(steps: int, batch: int) -> Configuration:
        def once(seed: int) -> Stages:
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(seed)
            made = pipeline(
                PROMPT,
                timesteps=info.inference[str(steps)],
                guidance_scale=0,
                num_images_per_prompt=batch,
                generator=generator,
                output_type="np",
            ).images
            for image in made:
                encode_image((image * 255).round().astype("uint8"), "png")
            return {"total": [1000 * (time.perf_counter() - started)]}

        return Configuration(name, "torch", "fp32", steps, batch, steps, once)

    return configuration


def _tried(
    base: str, lora: Path, device: str, compiled: bool, steps: int, report: Callable[[str], None]
) -> Callable[[int, int], Configuration] | None:
    """`stock_diffusers` after its first image; None, and `report` hears why, when compiling fails, as without a C++ compiler."""
    made = stock_diffusers(base, lora, device=device, compiled=compiled)
    try:
        made(steps, 1).once(0)
    except Exception as error:  # torch.compile raises many kinds
        if not compiled:
            raise
        report(f"without diffusers, compiled: {first_line(error)}")
        return None
    return made


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The totals as a table, each row with its speed-up over its teacher at the most steps and the ideal one.

    A 95th percentile is told from 20 samples on: of fewer it is the largest.
    """
    measured = {row["stage"] for row in rows} - {"total"}
    names = {"denoise_step": "one step", "image_encoding": "PNG"}
    stages = [stage for stage in STAGES if stage in measured]
    several = len({row["backend"] for row in rows if row["model"] == "teacher"}) > 1
    titles = ("model", *(["backend"] if several else []), "batch", "steps", "evaluations")
    titles += tuple(names.get(stage, stage) for stage in stages)
    has_p95 = all(row["n"] >= 20 for row in rows if row["stage"] == "total")
    median = "total, median (p95) ms" if has_p95 else "total, median ms"
    lines = [f"| {' | '.join(titles)} | {median} | speed-up | ideal |", "|---" * (len(titles) + 3) + "|"]
    for total, stage, teacher in _totals(rows):
        p95 = f" ({total['p95_ms']:.1f})" if has_p95 else ""
        about = (total["model"], *([total["backend"]] if several else []), total["batch"], total["steps"], total["nfe"])
        lines.append(
            f"| {' | '.join(map(str, about))} | "
            + "".join(f"{stage[name]:.2f} | " if name in stage else " | " for name in stages)
            + f"{total['median_ms']:.1f}{p95} | {teacher['total'] / total['median_ms']:.1f}x"
            + f" | {teacher['nfe'] / total['nfe']:.0f}x |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Beyond:
    """Why a student's speed-up is not the ideal one: milliseconds beyond the teacher's time over the ratio of evaluations."""

    total: dict[str, Any]
    """The row."""
    ideal: float
    fixed: float
    """Text, decoding and PNG, which few steps do not make fewer."""
    evaluations: float
    """The teacher's guided pair runs as one batch, which costs less than two evaluations alone: the student has no such pair."""
    served: float
    """Queue and wire."""

    @property
    def other(self) -> float:
        return float(self.total["median_ms"]) - self.ideal - self.fixed - self.evaluations - self.served

    @property
    def of_ideal(self) -> float:
        return self.ideal / float(self.total["median_ms"])


def beyond_ideal(rows: Sequence[dict[str, Any]]) -> list[Beyond]:
    """Of every student whose stages are known."""
    found = []
    for total, stage, teacher in _totals(rows):
        if "denoise_step" in stage and total["model"] != "teacher":
            share = total["nfe"] / teacher["nfe"]
            fixed = sum(stage[name] - share * teacher[name] for name in ("text", "decode", "image_encoding"))
            evaluations = total["steps"] * stage["denoise_step"] - share * teacher["steps"] * teacher["denoise_step"]
            served = stage.get("queue", 0.0) + stage.get("wire", 0.0)
            found.append(Beyond(total, share * teacher["total"], fixed, evaluations, served))
    return found


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """`markdown`, and a line per student of where the rest of the ideal speed-up went."""
    titles = ("model", "backend", "batch", "steps", "ideal, ms", "+ text, decode, PNG", "+ dearer evaluations", "+ queue, wire")
    lines = [f"| {' | '.join(titles)} | + other | = measured, ms | of the ideal |", "|---" * (len(titles) + 3) + "|"]
    for found in beyond_ideal(rows):
        about = (found.total[name] for name in ("model", "backend", "batch", "steps"))
        spent = (found.ideal, found.fixed, found.evaluations, found.served, found.other, found.total["median_ms"])
        lines.append(f"| {' | '.join(map(str, about))} | {' | '.join(f'{ms:.1f}' for ms in spent)} | {found.of_ideal:.2f} |")
    rest = ["", "Where the rest of the ideal speed-up went:", "", *lines] if len(lines) > 2 else []
    return "\n".join([markdown(rows), *rest])


def of_main_backend(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the first bundles, and of what one would use instead."""
    return [row for row in rows if _is_stock(row) or all(row[name] == rows[0][name] for name in ("backend", "precision"))]


def _is_stock(row: dict[str, Any]) -> bool:
    return str(row["model"]).startswith("diffusers")


def _totals(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, float], dict[str, float]]]:
    """(row of a total, its stages, its teacher's stages, steps and nfe) of every configuration. The teacher is the one on the
    same backend at the same batch and the most steps; what one would use instead is held against the first backend's."""

    def stages(total: dict[str, Any]) -> dict[str, float]:
        key = ("model", "backend", "precision", "batch", "steps")
        return {row["stage"]: row["median_ms"] for row in rows if all(row[name] == total[name] for name in key)}

    totals = [row for row in rows if row["stage"] == "total"]
    for total in totals:
        teachers = [row for row in totals if row["model"] == "teacher" and row["batch"] == total["batch"]]
        own = [row for row in teachers if all(row[name] == total[name] for name in ("backend", "precision"))]
        if _is_stock(total) or not own:
            own = [row for row in teachers if row["backend"] == teachers[0]["backend"]]
        teacher = max(own, key=lambda row: int(row["steps"]))
        yield total, stages(total), {**stages(teacher), "steps": teacher["steps"], "nfe": teacher["nfe"]}


def run(
    pairs: Sequence[tuple[Path, Path]],
    *,
    batches: Sequence[int],
    repeats: int,
    report: Callable[[str], None],
    steps: Sequence[int] = (1, 2, 4),
    teacher_steps: Sequence[int] = (50,),
    behind_server: bool = False,
    instead: tuple[str, Path] | None = None,
) -> dict[str, Any]:
    """Open the bundles, (student, teacher) a backend, measure, and return {"environment": ..., "rows": [...]}; the first student
    is the one that is served, and `instead` has base and LoRA for diffusers."""
    opened = [(open_bundle(student), open_bundle(teacher)) for student, teacher in pairs]
    for student, teacher in opened:
        _check_pair(student, teacher)
        for name, engine in (("student", student), ("teacher", teacher)):
            if max(batches) * engine.spec.sampler.evaluations_per_step > engine.max_batch:
                raise BundleError(
                    f"--batch {max(batches)}: the {name} bundle takes at most {engine.max_batch} evaluations at once"
                )
    kinds = [(student.manifest.backend, student.manifest.precision) for student, _ in opened]
    if len(set(kinds)) < len(kinds):
        raise BundleError("two students are of one backend and precision: their rows could not be told apart")
    first = opened[0][0].manifest
    if any(student.manifest.base_hash != first.base_hash for student, _ in opened):
        raise BundleError("the students are not of one base")
    steps = [count for count in steps if count <= first.model.sampler.max_steps]
    with ExitStack() as stack:
        client = None
        if behind_server:
            client = stack.enter_context(Client(stack.enter_context(server(pairs[0][0])).address))
        stock = []
        if instead:
            device = first.machine.device
            ways = (False, True) if repeats > 1 else (False,)
            stock = [made for compiled in ways if (made := _tried(*instead, device, compiled, steps[0], report))]
        configurations = []
        for batch in batches:
            for (student, teacher), kind in zip(opened, kinds, strict=True):
                configurations += [in_process("student", student, count, batch, *kind) for count in steps]
                if kind == kinds[0]:
                    configurations += [served(client, count, batch, *kind) for count in steps if client]
                    configurations += [make(count, batch) for make in stock for count in steps]
                configurations += [in_process("teacher", teacher, count, batch, *kind) for count in teacher_steps]
        record = environment(
            {
                name if kind == kinds[0] else f"{name}, {' '.join(kind)}": engine.manifest
                for pair, kind in zip(opened, kinds, strict=True)
                for name, engine in zip(("student", "teacher"), pair, strict=True)
            }
        )
        samples = measure(configurations, repeats, report)
    rows = [
        timed_row(c.backend, c.precision, c.model, c.batch, c.steps, c.nfe, stage, samples[c, stage])
        for c in configurations
        for stage in STAGES
        if (c, stage) in samples
    ]
    return {"environment": record, "rows": rows}


def peaks(
    pairs: Sequence[tuple[Path, Path]], batch: int, report: Callable[[str], None], instead: tuple[str, Path] | None = None
) -> list[dict[str, Any]]:
    """A row a model: peak of main memory, and of the device's where torch holds it, in MB; imports and opening included."""
    rows = []
    for pair in pairs:
        for path in pair:
            rows.append(_alone(_peak_of_bundle, path, batch))
    if instead:
        rows.append(_alone(_peak_of_stock, *instead, open_bundle(pairs[0][0]).manifest.machine.device, batch))
    report("\n| model | backend | batch | peak memory, MB | of the device, MB |\n|---|---|---|---|---|")
    for row in rows:
        report(f"| {row['model']} | {row['backend']} | {batch} | {row['peak_mb']:.0f} | {row['device_peak_mb'] or '-'} |")
    return rows


def _alone(measured: Callable[..., dict[str, Any]], *inputs: Any) -> dict[str, Any]:
    """In a new process, so that nothing that was there before counts."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, *inputs).result()


def _peak_of_bundle(bundle: Path, batch: int) -> dict[str, Any]:
    engine = open_bundle(bundle)
    model = "student" if engine.spec.sampler.kind == "flash" else "teacher"
    in_process(model, engine, 1, batch, "", "").once(0)
    return {"model": model, "backend": engine.manifest.backend, "precision": engine.manifest.precision, "batch": batch, **_peak()}


def _peak_of_stock(base: str, lora: Path, device: str, batch: int) -> dict[str, Any]:
    made = stock_diffusers(base, lora, device=device, compiled=False)(1, batch)
    made.once(0)
    return {"model": made.model, "backend": made.backend, "precision": made.precision, "batch": batch, **_peak()}


def _peak() -> dict[str, float | None]:
    lines = Path("/proc/self/status").read_text().splitlines()
    peak_kib = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    torch = sys.modules.get("torch")
    on_device = torch.cuda.max_memory_reserved() / 1e6 if torch and torch.cuda.is_initialized() else None
    return {"peak_mb": 1024 * peak_kib / 1e6, "device_peak_mb": on_device}


def build_pairs(
    base: str, lora: Path, batches: Sequence[int], also: Sequence[int], folder: Path, report: Callable[[str], None]
) -> list[tuple[Path, Path]]:
    """Student and teacher bundles in `folder`, a pair for every backend that runs here; `report` hears of those that do not.

    They take `batches`, and the batch sizes `also`. The teacher is guided as the student was taught.
    """
    from flashdiff.engines.build import BuildOptions, build_engine
    from flashdiff.lora import find_lora, read_flash_info  # with torch, which the served rows must not have

    pairs = []
    info = read_flash_info(find_lora(str(lora)))
    guidance = statistics.mean(info.guidance) if info else None
    sizes = sorted({*batches, *also})
    guided = sorted({*sizes, *(2 * batch for batch in batches)})  # the teacher evaluates every image twice
    for backend in _BACKENDS:
        student, teacher = folder / f"{backend}-student", folder / f"{backend}-teacher"
        try:
            build_engine(
                BuildOptions(base=base, loras=((str(lora), 1.0),), backend=backend, batch_sizes=tuple(sizes), out=student), report
            )
            build_engine(
                BuildOptions(base=base, backend=backend, batch_sizes=tuple(guided), guidance=guidance, out=teacher), report
            )
        except BackendError as error:
            report(f"without {backend}: {error}")
        else:
            pairs.append((student, teacher))
    if not pairs:
        raise BackendError("no backend runs here")
    return pairs


def _check_pair(student: Engine, teacher: Engine) -> None:
    """BundleError where comparing the two would say nothing."""
    kinds = [engine.spec.sampler.kind for engine in (student, teacher)]
    if kinds != ["flash", "ode"]:
        raise BundleError(
            f"the student must be a bundle with a flash LoRA and the teacher one without, not {kinds[0]} and {kinds[1]}"
        )
    if student.manifest.backend != teacher.manifest.backend:
        raise BundleError("student and teacher must be built for the same backend, or the comparison says nothing")
    if student.manifest.base_hash != teacher.manifest.base_hash:
        raise BundleError("the teacher bundle is not of the student's base")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--student",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="absent: built of --base and --lora for every backend",
    )
    parser.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="of the same base and backend, without the flash LoRA",
    )
    parser.add_argument("--steps", default="1,2,3,4", metavar="N[,N...]", help="of the student; default: %(default)s")
    parser.add_argument("--teacher-steps", default="50,25", metavar="N[,N...]", help="default: %(default)s")
    parser.add_argument("--batch", default="1", metavar="N[,N...]", help="images at once; default: %(default)s")
    parser.add_argument("--base", metavar="BASE", help="with --lora: time stock diffusers too")
    parser.add_argument("--lora", type=Path, metavar="FOLDER")
    parser.add_argument("--repeats", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one repeat of few steps: does it run, not what it measures")
    parser.add_argument("--json", type=result_file, metavar="FILE", help="write environment, rows and every sample")
    options = parser.parse_args()
    from flashdiff.engines.config import BuildOptions, parse_batches

    try:
        if options.repeats < 1:
            raise ConfigError(f"--repeats {options.repeats}: give a number from 1 on")
        if (options.base is None) != (options.lora is None):
            raise ConfigError("--base and --lora go together")
        if len(options.student) != len(options.teacher):
            raise ConfigError("--student and --teacher take the same number of bundles, pairs in order")
        if not options.student and not options.base:
            raise ConfigError("give --student and --teacher, or --base and --lora")
        if options.base:
            check_stock(options.base)
        batches = parse_batches(options.batch)
        # As `build-engine` makes them by default, so that rows of the other benchmarks can stand beside these.
        also = () if options.quick else BuildOptions.model_fields["batch_sizes"].default
        with tempfile.TemporaryDirectory() as folder:
            pairs = [*zip(options.student, options.teacher, strict=True)]
            pairs = pairs or build_pairs(options.base, options.lora, batches, also, Path(folder), print)
            instead = (options.base, options.lora) if options.base else None
            report = run(
                pairs,
                batches=batches,
                repeats=1 if options.quick else options.repeats,
                report=print,
                steps=[1] if options.quick else parse_numbers("--steps", options.steps),
                teacher_steps=[2] if options.quick else parse_numbers("--teacher-steps", options.teacher_steps),
                behind_server=True,
                instead=instead,
            )
            print(summary(report["rows"]))
            report["memory"] = peaks(pairs, max(batches), print, instead)
        if options.json:
            write_whole(options.json, json.dumps(report) + "\n")
    except (FlashdiffError, OSError) as error:
        print(f"latency.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
