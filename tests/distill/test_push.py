"""`distill --push`: the LoRA and its card on a hub, and what the hub refuses."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import Hub, running
from huggingface_hub import constants

from flashdiff import cli
from flashdiff.distill.comfyui import WORKFLOW, workflow
from flashdiff.distill.push import open_repository, push, repository_name
from flashdiff.errors import ConfigError, TrainingError
from flashdiff.families import load_base
from flashdiff.lora import read_flash_info
from flashdiff.lora_files import FLASH, KOHYA, WEIGHTS


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running(Hub({})) as served:
        for name, value in (("ENDPOINT", served.url), ("HF_HUB_OFFLINE", False), ("HF_TOKEN_PATH", str(tmp_path / "token"))):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        yield served


def test_a_finished_lora_is_pushed_with_its_card_and_nothing_of_the_training(hub: Hub, flash_lora: Path) -> None:
    name = repository_name("owner/flash-tiny")
    open_repository(name)
    address = push(flash_lora, name)
    assert address == f"{hub.url}/owner/flash-tiny"
    files = hub.pushed["owner/flash-tiny"]
    assert set(files) == {WEIGHTS, KOHYA, FLASH, WORKFLOW, "README.md"}
    assert all(content == (flash_lora / name).read_bytes() for name, content in files.items())
    assert files["README.md"].startswith(b"---\nlibrary_name: diffusers\n")  # its base is no repository
    assert b"[text-to-image, lora, flash-diffusion, flashdiff]" in files["README.md"]


def test_what_the_hub_refuses_shows_in_one_line_before_the_training(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("flash", "owner/name/file", "owner/name@main"):
        with pytest.raises(ConfigError, match=f"--push {name}: give a repository on the hub as owner/name"):
            repository_name(name)
    assert hub.requests == []
    hub.read_only = "other/flash"
    with pytest.raises(
        TrainingError, match=r"--push other/flash: the hub did not take it \(it answered with status 403: set HF_TOKEN"
    ):
        open_repository(repository_name("other/flash"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(
        TrainingError, match=r"--push owner/flash: the hub did not take it \(it answered with status 401: set HF_TOKEN"
    ):
        open_repository(repository_name("owner/flash"))
    assert cli.main(["distill", "avatars.toml", "--out", str(tmp_path / "out"), "--push", "owner/flash"]) == 2
    assert "\n" not in capsys.readouterr().err.strip()
    assert not (tmp_path / "out").exists()


def test_the_comfyui_workflow_is_wired_and_its_scheduler_takes_the_times_that_were_trained(
    flash_lora: Path, tiny_base: Path
) -> None:
    spec = load_base(str(tiny_base))[1].spec
    nodes = json.loads((flash_lora / WORKFLOW).read_text())
    links = [(value[0], name) for node in nodes.values() for name, value in node["inputs"].items() if isinstance(value, list)]
    assert {place for place, _ in links} == set(nodes) - {"8"}  # every node but the last feeds another
    sampled = next(node["inputs"] for node in nodes.values() if node["class_type"] == "KSampler")
    assert (sampled["sampler_name"], sampled["scheduler"], sampled["cfg"], sampled["steps"]) == ("lcm", "simple", 1.0, 4)
    table = list(range(1000))  # ComfyUI's `simple`: the entries -(1 + int(x * 1000 / steps))
    info = read_flash_info(flash_lora)
    assert info
    assert [table[-(1 + int(step * 1000 / 4))] for step in range(4)] == info.inference["4"]
    assert workflow(spec.model_copy(update={"family": "flux"}), 4) is None
    assert [workflow(spec, modes) is None for modes in (2, 6, 8)] == [True, True, False]
