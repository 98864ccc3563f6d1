"""LoRAs as peft saves them: `adapter_model.safetensors` with `adapter_config.json`, fused as peft merges them, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model

from flashdiff.errors import LoraError
from flashdiff.lora import find_lora, load_fused, lora_files, lora_hash, lora_name

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TARGETS = ["to_q", "to_v", "conv1"]


def _adapter(base: Path, out: Path, **settings: Any) -> Any:
    """An adapter with random weights in `out`, and the network with it merged by peft."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, **settings)
    network = get_peft_model(UNet2DConditionModel.from_pretrained(base / "unet"), config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    network.save_pretrained(out)
    return network.merge_and_unload()


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"to_v": 9}, "rank_pattern": {"attn1.to_q": 2}}, {"use_dora": True}],
    ids=["plain", "rslora", "patterns", "dora"],
)
def test_an_adapter_is_fused_as_peft_merges_it(tiny_base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    merged = _adapter(tiny_base, tmp_path / "style", **settings).state_dict()
    found = find_lora(str(tmp_path / "style"))
    assert lora_name(found) == "style"
    _, model = load_fused(str(tiny_base), [(found, 1.0)], None)
    fused = model.weights["unet"].state_dict()
    plain = UNet2DConditionModel.from_pretrained(tiny_base / "unet").state_dict()
    assert (fused[f"{Q}.weight"] - plain[f"{Q}.weight"]).abs().max() > 0.1
    for name, values in fused.items():
        torch.testing.assert_close(values, merged[name], atol=1e-5, rtol=1e-5)


def test_the_scale_counts_in_the_hash_and_is_watched(tiny_base: Path, tmp_path: Path) -> None:
    _adapter(tiny_base, tmp_path)
    found, config = find_lora(str(tmp_path)), tmp_path / "adapter_config.json"
    before = lora_hash(found)
    config.write_text(config.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    assert lora_hash(found) != before
    assert config in lora_files(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "its peft_type is 'LOHA'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
        ({"use_qalora": True}, "use_qalora is 'True'; such an adapter is no LoRA that can be fused"),
        (None, "is missing"),
        ([], "its peft_type is None"),
    ],
    ids=["loha", "olora", "pissa", "lora-ga", "qalora", "missing", "list"],
)
def test_an_adapter_that_is_no_ordinary_lora_is_refused(tiny_base: Path, tmp_path: Path, change: Any, words: str) -> None:
    _adapter(tiny_base, tmp_path)
    config = tmp_path / "adapter_config.json"
    if change is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change if change else change))
    with pytest.raises(LoraError, match=r"adapter_config\.json") as refusal:
        load_fused(str(tiny_base), [(find_lora(str(tmp_path)), 1.0)], None)
    assert words in str(refusal.value)
