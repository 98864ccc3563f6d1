"""The same content gives the same bytes: published files hold neither chance nor the places of our sources."""

import json
from pathlib import Path

import safetensors.torch
import torch

from flashdiff.lora import with_ordered_header
from flashdiff.lora_files import WEIGHTS


def test_the_metadata_of_a_lora_file_is_in_one_order(flash_lora: Path) -> None:
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    written = {safetensors.torch.save(tensors, {str(key): "x" for key in range(20)}) for _ in range(8)}
    assert len(written) > 1  # the library's own order is another every time
    (ordered,) = {with_ordered_header(content) for content in written}
    assert safetensors.torch.load(ordered)["b"].tolist() == [0, 1, 2]
    content = (flash_lora / WEIGHTS).read_bytes()
    assert with_ordered_header(content) == content


def test_graphs_name_no_source_file(teacher_bundle: Path, student_bundle: Path) -> None:
    graphs = [*teacher_bundle.rglob("*.onnx"), *student_bundle.rglob("*.xml")]
    assert len(graphs) == 8
    for graph in graphs:
        assert not [word for word in (b".py", b"site-packages", b"torch.nn") if word in graph.read_bytes()], graph


def test_a_tokenizer_is_learned_without_chance() -> None:
    from flashdiff.config import load_recipe
    from flashdiff.zoo import train
    from flashdiff.zoo.recipe import ZooRecipe
    from flashdiff.zoo.text_encoder import make_tokenizer
    from flashdiff.zoo.world import KINDS, describe

    recipe, kinds = load_recipe(Path(train.__file__).parent / "avatars.toml", ZooRecipe), tuple(KINDS)
    scenes = [describe(kinds[seed % len(kinds)], seed) for seed in range(600)]
    learned = {make_tokenizer(scenes, recipe).backend_tokenizer.to_str() for _ in range(6)}
    assert len(learned) == 1
    assert len(json.loads(learned.pop())["model"]["merges"]) > 400
