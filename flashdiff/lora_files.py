"""The files of a LoRA: what they are called, and peft's settings in one of them. It needs no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashdiff.errors import LoraError, first_line
from flashdiff.reading import read_json

WEIGHTS = "pytorch_lora_weights.safetensors"
FLASH = "flash.json"
KOHYA = "kohya.safetensors"
"""The same weights in the naming that ComfyUI and similar tools read."""
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The files of a LoRA that peft saved: the scale stands in the second."""
FLASH_KEY = "flashdiff"
"""The key of the file's metadata under which flash.json stands again."""
SETTINGS_KEY = "lora_adapter_metadata"
"""The key under which diffusers keeps peft's settings."""
_CHANGING_STARTS = ("olora", "corda", "loftq", "lora_ga")
_CHANGING_SETTINGS = (
    "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "layer_replication",
    "alora_invocation_tokens",
)  # fmt: skip
"""peft's settings of adapters that do not add B A to a weight, or not always."""


def weights_file(lora: Path) -> Path:
    """The file with the tensors of a LoRA, which is that file or a folder."""
    return lora if lora.is_file() else lora / WEIGHTS


def flash_file(lora: Path) -> Path:
    """Where its flash.json would lie."""
    return (lora.parent if lora.name in (WEIGHTS, KOHYA) else lora) / FLASH


def peft_settings(file: Path) -> dict[str, Any]:
    """peft's settings of an adapter, or LoraError for one whose file does not hold all that it does."""
    try:
        settings: dict[str, Any] = dict(read_json(file))
    except FileNotFoundError:
        raise LoraError(f"{file} is missing: it holds the scale of {PEFT_WEIGHTS}; download both") from None
    except (OSError, ValueError, TypeError) as error:
        raise LoraError(f"{file} cannot be read: {first_line(error)}") from None
    if settings.get("peft_type") != "LORA":
        raise LoraError(f"{file}: its peft_type is {settings.get('peft_type')!r}; of peft's adapters only LORA can be fused")
    return settings


def check_peft_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """LoraError for settings, each with the folder before it, of an adapter that is no ordinary LoRA."""
    for key, value in settings.items():
        name = key.rpartition(".")[2]
        if name == "init_lora_weights" and str(value).lower().startswith((*_CHANGING_STARTS, "pissa")):
            raise LoraError(
                f"{file}: {name} is {value!r}, which changed the base's own weights; save the adapter with peft's "
                "`path_initial_model_for_weight_conversion`, which makes it an ordinary LoRA"
            )
        if name in _CHANGING_SETTINGS and value:
            raise LoraError(f"{file}: {name} is {str(value)[:60]!r}; such an adapter is no LoRA that can be fused")
