"""What a student is: a LoRA on the base, or the whole network. How each is made, named, read and published."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import safetensors.torch
from torch import Tensor, nn

from flashdiff.distill import processes
from flashdiff.distill.config import Recipe
from flashdiff.distill.network import Exchange, add_lora
from flashdiff.families.base import ModelFamily, TorchModel
from flashdiff.families.files import INDEX
from flashdiff.families.loading import load_part, read_config
from flashdiff.flash_model import save_flash_model
from flashdiff.lora import ADAPTER, FlashInfo, save_flash_lora
from flashdiff.lora_files import WEIGHTS


class StudentKind(ABC):
    """One value of the recipe's `student`."""

    @abstractmethod
    def insert(self, model: TorchModel, family: ModelFamily, recipe: Recipe) -> None:
        """Let what is trained take gradients, at its first values: the student then is the base."""

    def keep_teacher(self, model: TorchModel) -> None:  # noqa: B027  # a LoRA leaves the base as it is
        """Keep what training would change of the base. It comes after `insert`."""

    @abstractmethod
    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """What is trained, by names that do not depend on other adapters in the network."""

    @abstractmethod
    def described(self, recipe: Recipe, trained: int, network: int) -> str:
        """In a line, with its number of parameters and the network's own."""

    @abstractmethod
    def is_in(self, folder: Path) -> bool:
        """Whether a folder holds a published one."""

    @abstractmethod
    def read(self, folder: Path, family: ModelFamily) -> dict[str, Tensor]:
        """The weights of a published one by the names of `parameters`; raises what a damaged file leads to."""

    @abstractmethod
    def save(self, folder: Path, model: TorchModel, family: ModelFamily, info: FlashInfo) -> None:
        """Publish the present weights; flash.json is written last. LoraError where they cannot be written."""


class _Lora(StudentKind):
    def insert(self, model: TorchModel, family: ModelFamily, recipe: Recipe) -> None:
        assert recipe.lora
        add_lora(model, family, recipe.lora, seed=recipe.seed)

    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in network.named_parameters() if f".{ADAPTER}." in name}

    def described(self, recipe: Recipe, trained: int, network: int) -> str:
        assert recipe.lora
        return f"LoRA rank {recipe.lora.rank}: {trained:,} parameters, {100 * trained / network:.1f} % of the denoiser"

    def is_in(self, folder: Path) -> bool:
        return (folder / WEIGHTS).is_file()

    def read(self, folder: Path, family: ModelFamily) -> dict[str, Tensor]:
        named = {}
        for key, value in safetensors.torch.load_file(folder / WEIGHTS).items():
            module, _, role = key.removeprefix(f"{family.lora_prefix}.").removesuffix(".weight").rpartition(".")
            named[f"{module}.{role}.{ADAPTER}.weight"] = value
        return named

    def save(self, folder: Path, model: TorchModel, family: ModelFamily, info: FlashInfo) -> None:
        save_flash_lora(folder, model, family, info)


class _Full(StudentKind):
    """All weights of the denoiser, in float32 whatever precision it computes in; the teacher's are a copy in that precision."""

    def insert(self, model: TorchModel, family: ModelFamily, recipe: Recipe) -> None:
        model.network.requires_grad_(True)

    def keep_teacher(self, model: TorchModel) -> None:
        trained, precision = self.parameters(model.network), processes.precision()
        frozen = {name: p.detach().to(precision, copy=True) for name, p in trained.items()}
        model.as_base = partial(Exchange(model.network, trained).held, frozen)

    def parameters(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return {name.replace(".base_layer", ""): p for name, p in network.named_parameters() if ".lora_" not in name}

    def described(self, recipe: Recipe, trained: int, network: int) -> str:
        return f"all {trained:,} parameters of the denoiser"

    def is_in(self, folder: Path) -> bool:
        return (folder / INDEX).is_file()

    def read(self, folder: Path, family: ModelFamily) -> dict[str, Tensor]:
        import diffusers

        written = read_config(folder, family.lora_prefix)["_class_name"]
        classes = family.networks[family.lora_prefix]
        assert not isinstance(classes, str)
        network = load_part(folder, family.lora_prefix, getattr(diffusers, classes[written]))
        return {name: p.detach() for name, p in self.parameters(network).items()}

    def save(self, folder: Path, model: TorchModel, family: ModelFamily, info: FlashInfo) -> None:
        if getattr(model.network, "peft_config", {}):  # a fake score's, which is not published
            model.network.unload_lora()
        save_flash_model(folder, model, family, info)


KINDS: Mapping[Literal["lora", "full"], StudentKind] = {"lora": _Lora(), "full": _Full()}


def kind_of(recipe: Recipe) -> StudentKind:
    """The kind of student that a recipe trains."""
    return KINDS[recipe.student]
