"""What one update of `flashdiff distill` takes of main memory at real size: Stable Diffusion 1.5, random weights, 512x512.

    python benchmarks/memory.py --json memory.json            # two minutes on two cores, 8 GiB of memory

The weights are random and of the public configuration, so nothing is downloaded; 4.3 GB of them are written to a
temporary folder. The command runs in a process of its own, once, with all three losses and gradient checkpointing, at
batch 1 in float32; its peak is the kernel's own count. What the parts take is their number of values; what is left over
them are activations, and whatever else was there at the peak.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: the repository's root is what it imports from
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.real_size import GIB, make_base, run_measured, tell
from benchmarks.rows import environment, result_file
from flashdiff.lora import FLASH

_LORA_COPIES = 5  # weights, gradients, average, and AdamW's two moments

# The paper's last phase. The last of four modes on a grid of four points: the teacher takes one step, which is as large as any.
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
    """{"environment": ..., "rows": [one row]}; FlashdiffError when the command fails."""
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
        # The embedded base has 16 MB: what a process that read it holds are the libraries.
        libraries, _, _ = run_measured(folder, "distill", "avatars.toml", "--dry-run")
        _, _, told = run_measured(folder, "distill", str(recipe), "--dry-run")
        print(told, file=sys.stderr)
        peak, seconds, _ = run_measured(folder, "distill", str(recipe), "--out", str(folder / "out"))
        lora = json.loads((folder / "out" / FLASH).read_text())["lora_parameters"]
    parts = {
        "weights": 4 * sum(counts.values()) / GIB,
        "lora, gradients, average, moments": 4 * _LORA_COPIES * lora / GIB,
        "libraries": libraries,
    }
    parts["activations and the rest"] = peak - sum(parts.values())
    row = {
        "model": "sd15, random weights",
        "backend": "torch",
        "precision": "float32",
        "size": "512x512",
        "batch": 1,
        "stage": "one update of flashdiff distill, three losses",
        "gradient_checkpointing": True,
        "parameters": {**counts, "lora": lora},
        "planned": next(line for line in told.splitlines() if line.startswith("memory")),
        "peak_gib": round(peak, 2),
        "parts_gib": {part: round(gib, 2) for part, gib in parts.items()},
        "command_s": round(seconds),
    }
    return {"environment": environment({}), "rows": [row]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=result_file, required=True, help="where the row goes")
    options = parser.parse_args(arguments)
    return tell(run, options.json)


if __name__ == "__main__":
    sys.exit(main())
