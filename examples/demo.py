"""The main job with the embedded model: build, serve, request images over gRPC, compare with the teacher. `make demo` runs it.

    python -m examples.demo        # from the repository's root

Leaves demo/images.png, demo/report.md and demo/report.json.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks import latency
from benchmarks.timing.speedup import speedup_table
from flashdiff.engines.bundle import read_manifest
from flashdiff.engines.runtime.engine import open_bundle
from flashdiff.generate import generate
from flashdiff.server.client import Client
from flashdiff.server.replies import Control, Reference, Result
from flashdiff.tasks import check_order
from flashdiff.zoo.control_images import CONTROLS

OUT = Path("demo")
STUDENT, REFERRED, TEACHER = OUT / "student", OUT / "student-with-references", OUT / "teacher"
TEACHER_STEPS, TEACHER_GUIDANCE = 50, 3.0
PROMPTS = (
    "a green monster with horns, three eyes and a grin on a blue background",
    "a cactus in a pink pot with happy eyes on a cream background",
    "a purple planet with a thin ring and one moon on a black background",
    "a yellow robot with an antenna and a heart on a teal background",
    "a person with pink spiky hair, a hoodie and sunglasses on a white background",
    "a blue square face with big eyes and a grin on an orange background",
    "a red robot with a siren on a white background",
    "a teal planet",
)
ELSEWHERE = (
    "a monster on a purple background",
    "a plant in a pot on a teal background",
    "a planet on a red background",
    "a robot on a cream background",
    "a person on a blue background",
    "a face on a pink background",
    "a robot on a black background",
    "a planet on a navy background",
)
OTHER_COLORS = {
    "green": "pink", "pink": "blue", "purple": "red", "yellow": "purple", "blue": "green", "red": "yellow", "teal": "red",
    "white": "purple", "black": "blue", "cream": "teal",
}  # fmt: skip


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()

    say("1/5 Build the student's engine: the embedded model with its flash LoRA, and networks for edges and small pictures")
    options = [option for name in ("edges", "tile") for option in ("--control", f"{name}=avatars-{name}")]
    flashdiff("build-engine", "avatars", "--lora", "avatars-flash", *options, "--out", str(STUDENT))
    print("And once more, with an adapter that draws the figure of a reference")
    flashdiff("build-engine", "avatars", "--lora", "avatars-flash", "--reference", "avatars-identity", "--out", str(REFERRED))
    say("2/5 Build the teacher's engine: the same model without it, guided")
    flashdiff("build-engine", "avatars", "--guidance", str(TEACHER_GUIDANCE), "--out", str(TEACHER))

    say(f"3/5 Serve the student and request {len(PROMPTS)} images over gRPC, all at once: of prompts, from images, by controls")
    with server(STUDENT) as address, Client(address) as client:
        client.wait_until_ready(120)
        four, two = ask(client, steps=4), ask(client, steps=2)
        files = [png(image) for image in four]
        anew = ask(client, steps=4, seed=100, inputs=[{"image": file, "mask": png(middle(four[0].size))} for file in files])
        others = ask(client, steps=4, inputs=[{"image": file} for file in files[-1:] + files[:-1]])
        drawn = [Image.fromarray(CONTROLS["edges"](np.asarray(image.convert("RGB")))) for image in four]
        edges = [Control(name="edges", image=png(image)) for image in drawn]
        recoloured = ask(client, steps=4, prompts=[in_other_colors(prompt) for prompt in PROMPTS], seed=200, controls=edges)
        small = [image.convert("RGB").reduce(2) for image in four]
        tiles = [Control(name="tile", image=png(image)) for image in small]
        enlarged = ask(client, steps=4, seed=300, controls=tiles)
    with server(REFERRED) as address, Client(address) as client:
        client.wait_until_ready(120)
        elsewhere = ask(client, steps=4, prompts=ELSEWHERE, seed=300, references=[Reference(image=file) for file in files])

    say(f"4/5 The teacher's images: {TEACHER_STEPS} steps with guidance {TEACHER_GUIDANCE:g}, same prompts and seeds")
    began = time.monotonic()
    engine = open_bundle(TEACHER)
    orders = [check_order(engine.spec, prompt=prompt, seed=seed, steps=TEACHER_STEPS) for seed, prompt in enumerate(PROMPTS)]
    fifty = [Image.fromarray(images[0]) for images in generate(engine, orders)]
    print(f"{len(fifty)} images in {time.monotonic() - began:.1f} s")
    rows = [(f"teacher\n{TEACHER_STEPS} steps", fifty), ("student\n4 steps", four), ("student\n2 steps", two)]
    rows += [("4 steps, the\nmiddle anew", anew), ("4 steps from\nthe image on\nits left", others)]
    rows += [("4 steps in\nother colours\nby the edges\nof row 2", recoloured)]
    rows += [("row 2 at half\nthe size", small), ("4 steps,\nenlarged", enlarged)]
    rows += [("4 steps, the\nfigure of row 2\nelsewhere", elsewhere)]
    sheet(rows).save(OUT / "images.png")

    say("5/5 Latency, one image at a time: student at 1, 2, 4 steps against the teacher at 50, interleaved")
    report = latency.run([(STUDENT, TEACHER)], batches=[1], repeats=20, report=print)
    (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    table = speedup_table(report["rows"])
    (OUT / "report.md").write_text(markdown(report, table))
    print(f"\n{table}\n")
    say(f"Done in {time.monotonic() - started:.0f} s: see {OUT}/images.png, {OUT}/report.md and {OUT}/report.json")
    print("To try it in a browser, run this and open http://127.0.0.1:8000")
    print(f"$ {os.path.relpath(Path(sys.executable).with_name('flashdiff'))} serve avatars --http-port 8000")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def flashdiff(*arguments: str) -> None:
    """Run the command line as a user would; stop the demo when it fails."""
    print(f"$ flashdiff {' '.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, "-m", "flashdiff", *arguments]).returncode:
        sys.exit(1)


@contextmanager
def server(bundle: Path) -> Iterator[str]:
    """A `flashdiff serve` process on a free port; stopped by SIGTERM, whose drain must end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    print(f"$ flashdiff serve {bundle} --port {port}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "flashdiff", "serve", str(bundle), "--port", str(port)])
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    if status:
        sys.exit(f"the server ended with status {status}")


def ask(
    client: Client,
    steps: int,
    *,
    prompts: Sequence[str] = PROMPTS,
    seed: int = 0,
    inputs: Sequence[Mapping[str, bytes]] = (),
    controls: Sequence[Control] = (),
    references: Sequence[Reference] = (),
) -> list[Image.Image]:
    """All prompts at once, as eight clients would, each with its images, its control and its reference."""

    def generate(number: int) -> Result:
        return client.generate(
            prompts[number],
            seed=seed + number,
            steps=steps,
            inputs=inputs[number] if inputs else {},
            controls=controls[number : number + 1],
            reference=references[number] if references else None,
        )

    with ThreadPoolExecutor(len(prompts)) as pool:
        results = list(pool.map(generate, range(len(prompts))))
    for prompt, result in zip(prompts, results, strict=True):
        print(f"{steps} steps {result.timings['total']:6.1f} ms (queue {result.timings['queue']:5.1f})  {prompt}")
    return [Image.open(BytesIO(result.images[0])) for result in results]


def in_other_colors(prompt: str) -> str:
    """The prompt with its colours replaced by others."""
    return " ".join(OTHER_COLORS.get(word, word) for word in prompt.split())


def png(image: Image.Image) -> bytes:
    """The image as a file."""
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def middle(size: tuple[int, int]) -> Image.Image:
    """A mask of the middle half of an image's width and height."""
    width, height = size
    mask = Image.new("RGB", size)
    ImageDraw.Draw(mask).rectangle((width // 4, height // 4, 3 * width // 4 - 1, 3 * height // 4 - 1), fill="white")
    return mask


def sheet(rows: list[tuple[str, list[Image.Image]]], scale: int = 2, margin: int = 120) -> Image.Image:
    """Labelled rows of images, one column a prompt."""
    width, height = (scale * side for side in rows[0][1][0].size)
    canvas = Image.new("RGB", (margin + width * len(rows[0][1]), height * len(rows)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for top, (label, images) in enumerate(rows):
        draw.multiline_text((8, top * height + height // 2 - 20), label, fill="black", font=font)
        for left, image in enumerate(images):
            large = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
            canvas.paste(large, (margin + left * width, top * height))
    return canvas


def markdown(report: dict[str, Any], table: str) -> str:
    """The report for people."""
    environment = json.dumps(report["environment"], indent=2)
    prompts = "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(PROMPTS, 1))
    manifest = read_manifest(STUDENT)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in manifest.max_error.items())
    return f"""# flashdiff demo

![Teacher at {TEACHER_STEPS} steps above, student at 4 and 2 steps below; same prompts and seeds. Then the student's images of 4
steps: their middle made anew, the image of the column on the left as the start, other colours by their edges, their size
halved and doubled again, and their figures on other backgrounds](images.png)

Columns, from the left:

{prompts}

## Latency

Medians of {report["rows"][0]["n"]} interleaved runs on one engine, in ms, one image from prompt to PNG bytes. *Ideal* is the
ratio of network evaluations (guidance doubles the teacher's). The teacher's two evaluations of a step run as one
batch, which costs less than two, so the ideal stays out of reach.

{table}

## Exactness

Largest difference between engine and torch: {errors} (allowed {max(manifest.max_error_allowed.values()):.0e}).

## Environment

```json
{environment}
```
"""


if __name__ == "__main__":
    main()
