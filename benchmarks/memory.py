"""The main memory of one update of `flashdiff distill` at real size: Stable Diffusion 1.5, random weights, 512x512.

    python benchmarks/memory.py --json memory.json            # two minutes on two cores, 8 GiB of memory

Nothing is downloaded: 4.3 GB of random weights, in the public configuration's shapes, are written to a temporary folder. The
command runs once, in a process of its own, with all three losses and gradient checkpointing, at batch 1 in float32; its peak is
the kernel's count. The memory of weights, gradients and moments follows from their number of values; the rest of the peak are
activations and everything else.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: imports start from the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.command import command_parser, result_file, run_command, write_and_print_results
from benchmarks.environment import read_environment
from benchmarks.measurements import Measurement
from benchmarks.real_size.base import make_base
from benchmarks.real_size.measured_command import GIB, run_measured
from flashdiff.lora_files import FLASH

_LORA_COPIES = 5  # weights, gradients, average, and AdamW's two moments

# The paper's last phase, at the last of four modes on a grid of four points: the teacher's one step costs as much as any other.
_RECIPE = """
base = "{base}"
guidance = [3.0, 13.0]
batch_size = 1
learning_rate = 1e-5
gradient_checkpointing = true
data = {{ source = "{data}", images = 1 }}
grid = {{ solver_steps = 4 }}
lora = {{ rank = 128, alpha = 128 }}

[loss]
adversarial = {{ kind = "lsgan", r1_weight = 0.0 }}

[[phases]]
updates = 1
mode_weights = [0, 0, 0, 1]
adversarial = 0.3
distribution_matching = 0.7
"""


def run() -> dict[str, Any]:
    """{"environment": ..., "rows": [one measurement]}; FlashdiffError if the command fails."""
    import numpy as np
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = make_base("sd15", folder / "sd15")
        (folder / "images").mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)).save(folder / "images" / "0.png")
        (folder / "images" / "0.txt").write_text("noise")
        recipe = folder / "recipe.toml"
        recipe.write_text(_RECIPE.format(base=folder / "sd15", data=folder / "images"))
        # The embedded base has only 16 MB, so a process that reads it holds little but the libraries.
        libraries, _, _ = run_measured(folder, "distill", "avatars.toml", "--dry-run")
        _, _, output = run_measured(folder, "distill", str(recipe), "--dry-run")
        print(output, file=sys.stderr)
        peak, seconds, _ = run_measured(folder, "distill", str(recipe), "--out", str(folder / "out"))
        lora = json.loads((folder / "out" / FLASH).read_text())["lora_parameters"]
    parts = {
        "weights": 4 * sum(counts.values()) / GIB,
        "lora, gradients, average, moments": 4 * _LORA_COPIES * lora / GIB,
        "libraries": libraries,
    }
    parts["activations and the rest"] = peak - sum(parts.values())
    measurement: Measurement = {
        "model": "sd15, random weights",
        "backend": "torch",
        "precision": "float32",
        "size": "512x512",
        "batch": 1,
        "stage": "one update of flashdiff distill, three losses",
        "gradient_checkpointing": True,
        "parameters": {**counts, "lora": lora},
        "planned": next(line for line in output.splitlines() if line.startswith("memory")),
        "peak_gib": round(peak, 2),
        "parts_gib": {part: round(gib, 2) for part, gib in parts.items()},
        "command_s": round(seconds),
    }
    return {"environment": read_environment({}), "rows": [measurement]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--json", type=result_file, required=True, help="where the measurement goes")
    options = parser.parse_args(arguments)
    return run_command("memory", lambda: write_and_print_results(options.json, run()))


if __name__ == "__main__":
    sys.exit(main())
