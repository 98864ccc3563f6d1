"""torchrun starts a run of two processes again when one of them is killed: it goes on from the last checkpoint."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from recipes import tiny_recipe
from safetensors.torch import load_file

from flashdiff.lora_files import WEIGHTS

pytestmark = pytest.mark.slow

UPDATES, CHECKPOINT_EVERY = 9, 3
_RUN_S, _STOP_S = 400, 20
_MARK = "TEST_ELASTIC"
DEATHS = {"0": (0, 4), "1": (1, 7)}
"""By the number of the start: the process that dies, and before which update; each time one update is lost."""

RUN = """
import json, os, signal, sys
from pathlib import Path
from flashdiff.distill import loop
from flashdiff.distill.config import Recipe

recipe, out, deaths = sys.argv[1:]
start, update = os.environ["TORCHELASTIC_RESTART_COUNT"], loop._update

def update_or_die(model, student, *rest):
    if [int(os.environ["RANK"]), student.update] == json.loads(deaths).get(start):
        os.kill(os.getpid(), signal.SIGKILL)
    return update(model, student, *rest)

loop._update = update_or_die
with Path(out + ".starts").open("a") as starts:
    found = sorted(path.stem for path in Path(out, "training", "checkpoints").glob("*.pt"))
    starts.write(f"{start} {os.environ['RANK']} {os.environ['WORLD_SIZE']} {found}\\n")
loop.distill(Recipe.model_validate_json(Path(recipe).read_text()), Path(out))
"""


def _train(folder: Path, name: str, deaths: dict[str, tuple[int, int]]) -> Path:
    """The output of a run of two processes."""
    out = folder / name
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    mark = str(out)
    settings = {
        _MARK: mark,
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        # Without it torchrun 2.13 keeps its store for all starts, where processes find the addresses of those that have ended.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    log = folder / f"{name}.output"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*torchrun, str(folder / "run.py"), str(folder / "recipe.json"), str(out), json.dumps(deaths)],
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
        )
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_RUN_S)
        assert process.poll() == 0, f"{'ended' if process.poll() else 'no end'}: {log.read_text()[-3000:]}"
    finally:
        _stop(process, mark)
    return out


def _stop(torchrun: "subprocess.Popen[bytes]", mark: str) -> None:
    """By SIGTERM, with which torchrun ends its processes; what is left, by the mark: they outlive a kill of torchrun."""
    if torchrun.poll() is None:
        torchrun.terminate()
        with suppress(subprocess.TimeoutExpired):
            torchrun.wait(_STOP_S)
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
    torchrun.wait(_STOP_S)


def test_a_run_whose_processes_are_killed_ends_with_the_weights_of_an_undisturbed_one(tiny_base: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tiny_base, checkpoint_every=CHECKPOINT_EVERY, phases=[{"updates": UPDATES, "mode_weights": (1, 1, 1, 1)}]
    )
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    (tmp_path / "run.py").write_text(RUN)
    undisturbed, killed = _train(tmp_path, "undisturbed", {}), _train(tmp_path, "killed", DEATHS)

    starts = {tuple(line.split(maxsplit=3)) for line in (tmp_path / "killed.starts").read_text().splitlines()}
    found = {"0": "[]", "1": "['000003']", "2": "['000006']"}
    assert starts == {(start, rank, "2", found[start]) for start in found for rank in ("0", "1")}

    logs = [(out / "training" / "log.jsonl").read_text().splitlines() for out in (undisturbed, killed)]
    assert [json.loads(line)["update"] for line in logs[1]] == list(range(UPDATES))
    assert logs[0] == logs[1]
    weights = [load_file(out / WEIGHTS) for out in (undisturbed, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
