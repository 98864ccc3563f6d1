"""The examples of deploy for training on several machines: what Slurm's script runs, and what Kubernetes and JobSet take.

No cluster has seen them. `kubeflow-trainer-api` brings JobSet's fields, `kubernetes-validate` those of the job in it.
"""

import argparse
import copy
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashdiff.cli import distill

yaml = pytest.importorskip("yaml")

PLACE = Path(__file__).parents[2] / "deploy"
Object = dict[str, Any]


def _options(arguments: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """What torchrun makes of its arguments, and flashdiff of those that it gets from torchrun."""
    from torch.distributed.run import get_args_parser

    torchrun = get_args_parser().parse_args(arguments)
    assert torchrun.module
    assert (torchrun.training_script, torchrun.training_script_args[0]) == ("flashdiff", "distill")
    parser = argparse.ArgumentParser(exit_on_error=False)
    distill.add_arguments(parser)
    return torchrun, parser.parse_args(torchrun.training_script_args[1:])


def _sbatch(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run the script with programs that stand in for Slurm's: `srun` writes what it would start, a word a line."""
    programs = {"scontrol": 'test "$*" = "show hostnames gpu[3-4]" && printf "gpu3\\ngpu4\\n"', "srun": 'printf "%s\\n" "$@"'}
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "gpu[3-4]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "32",
    }
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **job, **variables}
    command = ["bash", str(PLACE / "slurm" / "train.sbatch"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_slurm_starts_one_torchrun_a_machine_that_finds_the_first(tmp_path: Path) -> None:
    done = _sbatch(tmp_path, "a recipe.toml", "/shared/runs/mine")
    assert done.returncode == 0, done.stderr
    kill, cores, program, *arguments = done.stdout.splitlines()
    assert (kill, cores, program) == ("--kill-on-bad-exit=1", "--cpus-per-task=32", "torchrun")
    torchrun, options = _options(arguments)
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.max_restarts) == ("2", "8", 3)
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint, torchrun.rdzv_id) == ("c10d", "gpu3:23456", "123456")
    assert (str(options.recipe), str(options.out)) == ("a recipe.toml", "/shared/runs/mine")


@pytest.mark.parametrize("arguments", [(), ("recipe.toml",)])
def test_slurms_script_says_what_it_needs(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = _sbatch(tmp_path, *arguments)
    assert done.returncode != 0
    assert "usage: sbatch train.sbatch RECIPE OUT" in done.stderr
    assert done.stdout == ""


@pytest.fixture(scope="module")
def objects() -> dict[str, Object]:
    """By kind."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: it puts the objects together")
    done = subprocess.run(["kubectl", "kustomize", PLACE / "kubernetes" / "training"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}


def _job(objects: dict[str, Object]) -> Object:
    (replicated,) = objects["JobSet"]["spec"]["replicatedJobs"]
    return replicated["template"]


def test_every_pod_starts_a_torchrun_that_finds_the_first(objects: dict[str, Object]) -> None:
    (replicated,) = objects["JobSet"]["spec"]["replicatedJobs"]
    job, pod = _job(objects)["spec"], _job(objects)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    torchrun, options = _options(container["args"])
    pods = replicated["replicas"] * job["completions"]
    assert (torchrun.nnodes, job["completionMode"], job["parallelism"]) == (str(pods), "Indexed", pods)
    assert torchrun.nproc_per_node == container["resources"]["limits"]["nvidia.com/gpu"]
    name, (port,) = objects["JobSet"]["metadata"]["name"], container["ports"]
    assert torchrun.rdzv_endpoint == f"{name}-{replicated['name']}-0-0.{name}:{port['containerPort']}"
    # Files are where something is mounted, and what the machines share is on the claim.
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert str(options.recipe.parent) == mounts["recipe"]
    assert {str(options.out.parent), str(Path(variables["XDG_CACHE_HOME"]).parent)} == {mounts["runs"]}
    claims = [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
    claim = objects["PersistentVolumeClaim"]
    assert (claims, claim["spec"]["accessModes"]) == ([claim["metadata"]["name"]], ["ReadWriteMany"])


def _validate(objects: dict[str, Object]) -> None:
    """An exception for what Kubernetes or JobSet would refuse."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **_job(objects)}
    for one in (job, objects["PersistentVolumeClaim"]):
        kubernetes_validate.validate(one, "1.32", strict=True)
    outer = copy.deepcopy(objects["JobSet"])
    known = models.JobsetV1alpha2JobSet.from_dict(outer).to_dict()
    for path in (("spec",), ("spec", "failurePolicy")):
        given, kept = outer, known
        for key in path:
            given, kept = given[key], kept[key]
        assert given.keys() <= kept.keys(), f"unexpected {given.keys() - kept.keys()}"


def test_kubernetes_and_jobset_take_the_objects(objects: dict[str, Object]) -> None:
    _validate(objects)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one["JobSet"]["spec"]["failurePolicy"].update(maxRestarts="many"),
        lambda one: one["JobSet"]["spec"].update(failurePolice={}),
        lambda one: _job(one)["spec"].update(completionMode=2),
        lambda one: _job(one)["spec"]["template"]["spec"]["containers"][0].update(commands=[]),
        lambda one: one["PersistentVolumeClaim"]["spec"].update(accessModes="ReadWriteMany"),
    ],
)
def test_what_they_would_refuse_is_found(objects: dict[str, Object], spoil: Callable[[dict[str, Object]], Any]) -> None:
    wrong = copy.deepcopy(objects)
    spoil(wrong)
    with pytest.raises(Exception, match=r"is not of type|[Uu]nexpected|valid integer"):
        _validate(wrong)
