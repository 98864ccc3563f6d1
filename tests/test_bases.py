"""Bases as they come: which files of one are loaded and hashed, variants, shards and pickles; and how a base is known again."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tiny import FAMILIES, make_tiny_sd15

from flashdiff.errors import LoraError, ModelError
from flashdiff.families import find_base, load_base
from flashdiff.families.files import base_files, base_hash, used_files
from flashdiff.families.prints import prints_of
from flashdiff.lora import check_base, read_flash_info
from flashdiff.lora_files import FLASH

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def _round(base: Path, dtype: torch.dtype) -> None:
    """Write the weights again in this precision."""
    for part, stem in WEIGHTS.items():
        file = base / part / f"{stem}.safetensors"
        save_file({name: values.to(dtype) for name, values in load_file(file).items()}, file, metadata={"format": "pt"})


def _rename_to_variant(base: Path, variant: str) -> None:
    for part, stem in WEIGHTS.items():
        (base / part / f"{stem}.safetensors").rename(base / part / f"{stem}.{variant}.safetensors")


def _weights(base: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    return dict(load_base(str(find_base(str(base), variant=variant)))[1].network.named_parameters())


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(values, other[name]) for name, values in one.items())


# --- what counts -----------------------------------------------------------------------------------------------------


def test_files_that_are_not_loaded_do_not_count(tiny_base: Path, copy: Path) -> None:
    for part, stem in WEIGHTS.items():
        shutil.copy(copy / part / f"{stem}.safetensors", copy / part / f"{stem}.fp16.safetensors")
        (copy / part / f"{stem}.bin").write_bytes(b"never read")
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "config.json").write_text("{}")
    (copy / "README.md").write_text("a card")
    assert base_hash(copy) == base_hash(tiny_base)
    assert find_base(str(copy)) == copy
    assert len(base_files(copy)) == len(base_files(tiny_base))
    (copy / "tokenizer" / "tokenizer_config.json").write_text("{}")
    assert base_hash(copy) != base_hash(tiny_base)


def test_t5_of_a_base_that_says_it_has_none_does_not_count(tmp_path: Path) -> None:
    base = FAMILIES["sd3"](tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None], "tokenizer_3": [None, None]}))
    before = base_hash(base)
    shutil.rmtree(base / "text_encoder_3")
    shutil.rmtree(base / "tokenizer_3")
    assert base_hash(base) == before


def test_the_embedded_student_fits_its_base() -> None:
    base = find_base("avatars")
    info = read_flash_info(base.parent / "avatars-flash")
    assert info is not None
    assert info.base_hash == base_hash(base)


def test_a_lora_that_was_trained_when_every_file_counted_still_fits(tiny_base: Path, copy: Path, flash_lora: Path) -> None:
    from flashdiff.families.files import hash_of_all

    (copy / "feature_extractor").mkdir()
    (copy / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    lora = Path(shutil.copytree(flash_lora, copy.parent / "lora"))
    info = json.loads((lora / FLASH).read_text())
    del info["base_prints"]
    (lora / FLASH).write_text(json.dumps({**info, "base_hash": hash_of_all(copy)}))
    assert hash_of_all(copy) != base_hash(copy)
    assert check_base(copy, base_hash(copy), [lora]) == []


# --- the same weights in another precision ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "said"), [(torch.float16, "float16"), (torch.bfloat16, "bfloat16")])
def test_a_lora_of_the_same_weights_in_another_precision_is_accepted_with_a_warning(
    copy: Path, flash_lora: Path, dtype: torch.dtype, said: str
) -> None:
    _round(copy, dtype)
    (warning,) = check_base(copy, base_hash(copy), [flash_lora])
    assert f"in another precision: {copy} has the same weights once both are rounded to {said}" in warning


def test_the_other_way_round_too(tiny_base: Path, copy: Path) -> None:
    _round(copy, torch.float16)
    assert prints_of(copy)["float16"] == prints_of(tiny_base)["float16"]
    assert prints_of(copy)["bfloat16"] != prints_of(tiny_base)["bfloat16"]  # rounded twice


def test_one_changed_layer_or_setting_is_another_base(copy: Path, flash_lora: Path) -> None:
    _round(copy, torch.float16)
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    changed = {**weights, "mid_block.attentions.0.proj_in.weight": weights["mid_block.attentions.0.proj_in.weight"] * 1.01}
    save_file(changed, file, metadata={"format": "pt"})
    with pytest.raises(LoraError, match="build it with its own base"):
        check_base(copy, base_hash(copy), [flash_lora])
    save_file(weights, file, metadata={"format": "pt"})
    assert check_base(copy, base_hash(copy), [flash_lora])
    scheduler = copy / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.02}))
    with pytest.raises(LoraError, match="build it with its own base"):
        check_base(copy, base_hash(copy), [flash_lora])


# --- variants, shards, pickles ---------------------------------------------------------------------------------------


def test_a_base_with_fp16_files_alone_is_loaded_as_the_same_files_under_plain_names(tmp_path: Path, copy: Path) -> None:
    _round(copy, torch.float16)
    plain = _weights(copy)
    hash_of_plain = base_hash(copy)
    _rename_to_variant(copy, "fp16")
    found = find_base(str(copy))
    assert (found.name, find_base(str(copy))) == (copy.name, found)
    assert base_hash(found) == hash_of_plain
    _assert_same(plain, _weights(copy))


def test_a_variant_is_loaded_on_request_as_in_stock_diffusers(copy: Path) -> None:
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(copy).to(torch.float16).save_pretrained(copy, variant="fp16")
    _assert_same(dict(StableDiffusionPipeline.from_pretrained(copy).unet.named_parameters()), _weights(copy))
    stock = StableDiffusionPipeline.from_pretrained(copy, variant="fp16").unet
    assert stock.dtype == torch.float32
    _assert_same(dict(stock.named_parameters()), _weights(copy, "fp16"))
    assert not torch.equal(_weights(copy)["conv_in.weight"], _weights(copy, "fp16")["conv_in.weight"])
    with pytest.raises(ModelError, match=f"--variant bf16: {copy} has no such weights; it has fp16"):
        find_base(str(copy), variant="bf16")


def test_several_variants_without_plain_files_need_a_choice(copy: Path) -> None:
    _rename_to_variant(copy, "fp16")
    shutil.copy(copy / "unet/diffusion_pytorch_model.fp16.safetensors", copy / "unet/diffusion_pytorch_model.bf16.safetensors")
    with pytest.raises(ModelError, match="unet has its weights as bf16, fp16 alone: choose one with --variant"):
        find_base(str(copy))
    assert _weights(copy, "fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_files_are_all_loaded_and_hashed(tmp_path: Path, variant: str | None) -> None:
    from diffusers import StableDiffusionPipeline

    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    pipeline = StableDiffusionPipeline.from_pretrained(make_tiny_sd15(tmp_path / "base"))
    pipeline.save_pretrained(whole)
    pipeline.save_pretrained(sharded, max_shard_size="200KB", variant=variant)
    shards = [*(sharded / "unet").glob("*-of-*.safetensors")]
    assert len(shards) > 2
    found = find_base(str(sharded))
    hashed = {path.resolve() for path in base_files(found)}
    assert {shard.resolve() for shard in shards} < hashed
    _assert_same(_weights(whole), _weights(sharded))
    assert prints_of(found) == prints_of(whole)


def test_older_names_of_sharded_variants_are_known(tiny_base: Path) -> None:
    from flashdiff.families import family_of

    names = {path.relative_to(tiny_base).as_posix() for path in base_files(tiny_base)}
    names -= {"unet/diffusion_pytorch_model.safetensors"}
    shards = {f"unet/diffusion_pytorch_model-0000{n}-of-00002.fp16.safetensors" for n in (1, 2)}
    index = "unet/diffusion_pytorch_model.safetensors.index.fp16.json"
    used = used_files({*names, *shards, index}, {}, family_of(tiny_base), source="it")
    assert used["unet/diffusion_pytorch_model.safetensors.index.json"] == index
    assert shards < {*used}


def test_pickles_are_refused_with_the_reason_and_the_cure(copy: Path) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors").rename(copy / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"unet has its weights as diffusion_pytorch_model\.bin, a pickle, .*save_pretrained"):
        find_base(str(copy))
    (copy / "unet/diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"unet has no weights: diffusion_pytorch_model\.safetensors is missing"):
        find_base(str(copy))


def test_a_model_is_named_after_its_repository_in_the_hubs_cache(tiny_base: Path, tmp_path: Path) -> None:
    from flashdiff.families import family_of

    snapshot = Path(shutil.copytree(tiny_base, tmp_path / "models--owner--tiny-model" / "snapshots" / ("0" * 40)))
    assert family_of(snapshot).read_spec(snapshot).name == "tiny-model"


def test_a_tokenizer_of_t5_may_be_sentencepieces_file_alone(tmp_path: Path) -> None:
    """As published before tokenizer.json."""
    base = FAMILIES["pixart"](tmp_path / "pixart")
    written = io.BytesIO()
    lines = ["a red robot on a blue background", "a cactus in a pink pot", "three eyes and a grin"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_writer=written, vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    shutil.rmtree(base / "tokenizer")
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "spiece.model").write_bytes(written.getvalue())
    (base / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 0})
    )
    _, model = load_base(str(base))
    ids = [int(number) for number in model.tokenizer(["a pink robot"])["input_ids"][0] if number]
    pieces = [piece.piece for piece in ModelProto.FromString(written.getvalue()).pieces]
    assert "".join(pieces[number] for number in ids) == "\u2581a\u2581pink\u2581robot</s>"
    assert 1 < len(ids) < len("a pink robot")
