"""Latency at real size, by stage: few steps against 50 guided ones, and against stock diffusers; random weights.

    python benchmarks/real_latency.py sdxl --precision bf16 --batch 1,4 --json latency.json

The networks have the public configurations' shapes, autoencoder and CLIP encoders too; T5 stands in small, so where a model has
one its text stage is too cheap. Their weights are made on the device, and run by the torch backend as a bundle's would (on a GPU:
CUDA graphs); no bundle is written. The student is the teacher's engine with a flash sampler in place of the guided ODE: what a
step takes does not depend on the values of weights. Diffusers runs networks of the same shapes and precision, eager and
compiled (its denoiser, at the first batch size). Every repeat runs each configuration in turn, from prompt to PNG bytes.

Last, the server's worker makes images of 2 and 4 steps from a queue that is never empty: finished rows decoded beside the steps
of others, as it does where the engine gains by it, and in turn.
"""

import argparse
import copy
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.latency import PROMPT, STAGES, Configuration, Stages, in_process, measure, summary
from benchmarks.real_size import NETWORKS, write_base
from benchmarks.rows import environment, result_file, timed_row
from flashdiff.components import Costs, ModelSpec
from flashdiff.config import parse_numbers
from flashdiff.engines.backends import find_backend
from flashdiff.engines.bundle import Manifest, PartFile, PartSpec, Precision, tokenizer_file
from flashdiff.engines.config import parse_batches
from flashdiff.engines.runtime.engine import Engine
from flashdiff.errors import ConfigError, FlashdiffError, first_line
from flashdiff.files import write_whole
from flashdiff.sampling import Sampler
from flashdiff.schedule import Grid
from flashdiff.server.images import encode_image
from flashdiff.server.jobs import Job
from flashdiff.server.models import Model
from flashdiff.server.names import ModelIdentity
from flashdiff.server.worker import Worker
from flashdiff.tasks import check_order

_GUIDANCE = 5.0
_FILLS = 4  # so many batches of requests in flight saturate a worker
_WORKER_S = 10.0


def student_spec(teacher: ModelSpec) -> ModelSpec:
    """The same network with a flash student's sampler."""
    sampler = Sampler(kind="flash", schedule=teacher.sampler.schedule, grid=Grid(solver_steps=32), default_steps=4)
    return teacher.model_copy(update={"sampler": sampler})


@contextmanager
def random_weights(base: Path, device: str) -> Iterator[None]:
    """Meanwhile the base's parts are made of their configurations, with the libraries' own random start, on the device."""
    import torch

    from flashdiff.families import family_of

    def make(folder: Path, part: str, kind: Any) -> Any:
        with torch.device(device):
            if hasattr(kind, "from_config"):
                model = kind.from_config(kind.load_config(folder / part))
            else:
                model = kind(kind.config_class.from_pretrained(folder / part))
        return model.eval().requires_grad_(False)

    with patch.object(sys.modules[family_of(base).load.__module__], "load_part", make):
        yield


def open_random(base: Path, precision: Precision, batches: Sequence[int]) -> Engine:
    """The torch backend's engine of a base without weights, as a bundle of it would be opened: guided."""
    from flashdiff.engines.backends.torch import MODEL
    from flashdiff.engines.parts import parts_of
    from flashdiff.families import load_base

    machine = find_backend("torch").machine()
    with random_weights(base, machine.device):
        family, model = load_base(str(base))
        parts = parts_of(family, model)
        for tokenizer in model.spec.tokenizers:
            write_whole(base.parent / tokenizer_file(tokenizer), model.tokenizer.texts[tokenizer.name])
        spec = model.spec.model_copy(
            update={"sampler": Sampler.model_validate({**model.spec.sampler.model_dump(), "guidance": _GUIDANCE})}
        )
        if not (base.parent / MODEL).exists():
            (base.parent / MODEL).symlink_to(base)
        specs = {part.name: PartSpec(files=(PartFile(file=MODEL),), inputs=part.inputs, outputs=part.outputs) for part in parts}
        del family, model, parts
        # Nothing is published, so the manifest has only what an engine reads.
        read: dict[str, Any] = {"model": spec, "backend": "torch", "precision": precision, "machine": machine, "parts": specs}
        return Engine(base.parent, Manifest.model_construct(**read, batch_sizes=tuple(batches), sizes=spec.sizes))


def stock(base: Path, device: str, precision: Precision) -> Any:
    """The stock pipeline of the same networks."""
    import diffusers
    from transformers import AutoTokenizer

    from flashdiff.engines.parts import DTYPES
    from flashdiff.families import load_base

    with random_weights(base, device):
        _, model = load_base(str(base))
    index = json.loads((base / "model_index.json").read_text())
    kind = getattr(diffusers, index["_class_name"])
    given: dict[str, Any] = {name: module.to(DTYPES[precision]) for name, module in model.weights.items()}
    given |= {name: AutoTokenizer.from_pretrained(base / name) for name in index if name.startswith("tokenizer")}
    given["scheduler"] = getattr(diffusers, index["scheduler"][1]).from_pretrained(base / "scheduler")
    needed = inspect.signature(kind.__init__).parameters.values()
    given |= {one.name: None for one in needed if one.default is one.empty and one.name not in (*given, "self")}
    if "requires_safety_checker" in {one.name for one in needed}:
        given["requires_safety_checker"] = False
    pipeline = kind(**given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def torchs_own_precision() -> Iterator[None]:
    """Stock diffusers runs as torch comes, which our engine does not leave it: see `no_reduced_precision`."""
    import torch

    from flashdiff.engines.parts import no_reduced_precision

    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    try:
        yield
    finally:
        no_reduced_precision()


def of_stock(pipeline: Any, name: str, precision: Precision, steps: int, batch: int, *, guided: bool) -> Configuration:
    """One way to run the pipeline, from prompt to PNG bytes."""
    import torch
    from diffusers import LCMScheduler

    scheduler = pipeline.scheduler
    if not guided and not hasattr(scheduler.config, "shift"):  # a flow's own sampler takes few steps too
        scheduler = LCMScheduler.from_config(scheduler.config)

    def once(seed: int) -> Stages:
        started = time.perf_counter()
        pipeline.scheduler = scheduler
        with torchs_own_precision():
            made = pipeline(
                PROMPT,
                num_inference_steps=steps,
                guidance_scale=_GUIDANCE if guided else 0.0,
                num_images_per_prompt=batch,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
            ).images
        for image in made:
            encode_image((image * 255).round().astype("uint8"), "png")
        return {"total": [1000 * (time.perf_counter() - started)]}

    return Configuration(name, "torch", precision, steps, batch, steps * (2 if guided else 1), once)


def through_worker(engine: Engine, costs: Costs, seconds: float, *, beside: bool) -> dict[str, Any]:
    """Images a second of the server's worker with a full queue, decoding beside or in turn."""
    engine = copy.copy(engine)
    engine.parallel_decode = beside
    identity = ModelIdentity(engine.spec.name, "", engine.spec.family, "torch", engine.manifest.precision)
    fill = _FILLS * engine.max_batch
    model, worker = Model(identity, engine, costs), Worker(max_pending_images=fill)
    made, sent, running = -fill, 0, set[Job]()  # the first fill, which finds an idle engine, is not counted
    started = time.perf_counter()
    while made <= 0 or time.perf_counter() - started < seconds:
        while len(running) < fill:
            order = check_order(engine.spec, prompt=f"robot {sent}", seed=sent, steps=(2, 4)[sent % 2])
            running.add(worker.submit(model, order))
            sent += 1
        wait([job.answer for job in running], return_when=FIRST_COMPLETED)
        for job in [job for job in running if job.answer.done()]:
            job.answer.result()
            worker.release(job)
            running.remove(job)
            made += 1
            if made == 0:
                started = time.perf_counter()
    spent = time.perf_counter() - started
    worker.drain()
    worker.join(60)
    rate = {"images": made, "seconds": round(spent, 2), "images_per_s": round(made / spent, 2)}
    return {"decoding": "beside" if beside else "in turn", "batch": engine.max_batch, **rate}


def run(
    name: str,
    base: Path,
    *,
    precision: Precision,
    batches: Sequence[int],
    repeats: int,
    teacher_steps: Sequence[int] = (50,),
    compiles: bool = True,
    worker_s: float = _WORKER_S,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure a base that `write_base` made without weights; {"environment": ..., "rows": [...], "worker": [...]}."""
    teacher = open_random(base, precision, sorted({*batches, *(2 * batch for batch in batches)}))
    student = copy.copy(teacher)
    student.spec = student_spec(teacher.spec)
    costs = student.measure_costs()
    report("engine ready")
    timed = list[Configuration]()
    for batch in batches:
        timed += [in_process("student", student, steps, batch, "torch", precision) for steps in (1, 2, 3, 4)]
        timed += [in_process("teacher", teacher, steps, batch, "torch", precision) for steps in teacher_steps]
    device = teacher.manifest.machine.device
    eager = stock(base, device, precision)
    for batch in batches:
        timed += [of_stock(eager, "diffusers", precision, steps, batch, guided=False) for steps in (2, 4)]
    timed.append(of_stock(eager, "diffusers, guided", precision, teacher_steps[0], batches[0], guided=True))
    if compiles:
        timed += _compiled(base, device, precision, batches[0], report)
    record = environment({}) | {"gpu": teacher.manifest.machine.processor if device == "cuda" else None}
    samples = measure(timed, repeats, report)
    rows = [
        timed_row(c.backend, c.precision, c.model, c.batch, c.steps, c.nfe, stage, samples[c, stage])
        for c in timed
        for stage in STAGES
        if (c, stage) in samples
    ]
    report(summary(rows))
    worker = [through_worker(student, costs, worker_s, beside=beside) for beside in (True, False) * 2]
    report("\n".join(f"worker, decoding {row['decoding']}: {row['images_per_s']} images/s" for row in worker))
    return {
        "environment": record,
        "model": f"{name}, random weights, {teacher.spec.sizes[0]}",
        "rows": rows,
        "costs_ms": [[part, batch, ms] for (part, _), by_batch in costs.items() for batch, ms in by_batch.items()],
        "worker": worker,
    }


def _compiled(base: Path, device: str, precision: Precision, batch: int, report: Callable[[str], None]) -> list[Configuration]:
    """Stock diffusers with a compiled denoiser; nothing, and `report` hears why, where compiling fails."""
    import torch

    pipeline = stock(base, device, precision)
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    setattr(pipeline, part, torch.compile(getattr(pipeline, part), dynamic=False))
    found = [of_stock(pipeline, "diffusers, compiled", precision, steps, batch, guided=False) for steps in (2, 4)]
    started = time.monotonic()
    try:
        found[0].once(0)
    except Exception as error:  # torch.compile raises many kinds
        report(f"without diffusers, compiled: {first_line(error)}")
        return []
    report(f"diffusers compiled its denoiser in {time.monotonic() - started:.0f} s")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NETWORKS)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="bf16", help="default: %(default)s")
    parser.add_argument("--batch", default="1", metavar="N[,N...]", help="images at once; default: %(default)s")
    parser.add_argument("--teacher-steps", default="50", metavar="N[,N...]", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave compiled diffusers out: it takes a minute or more")
    parser.add_argument("--json", type=result_file, required=True, help="where the rows go")
    options = parser.parse_args(arguments)

    try:
        if options.repeats < 1:
            raise ConfigError(f"--repeats {options.repeats}: give a number from 1 on")
        batches, teacher_steps = parse_batches(options.batch), parse_numbers("--teacher-steps", options.teacher_steps)
        with tempfile.TemporaryDirectory() as place:
            base = Path(place, options.model)
            write_base(options.model, base, is_whole=True, weights=False)
            found = run(
                options.model,
                base,
                precision=options.precision,
                batches=batches,
                repeats=options.repeats,
                teacher_steps=teacher_steps,
                compiles=not options.no_compile,
                report=lambda line: print(line, flush=True),
            )
        write_whole(options.json, json.dumps(found) + "\n")
    except (FlashdiffError, OSError) as error:
        print(f"real_latency.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
