"""The one network behind teacher, student and fake score: whose weights it has, and where and in which precision it runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashdiff.components import ModelSpec
from flashdiff.distill import processes
from flashdiff.distill.config import LoraRecipe, Recipe
from flashdiff.distill.int8 import round_to_int8
from flashdiff.errors import ConfigError
from flashdiff.families.base import GUIDANCE, ModelFamily, TorchModel
from flashdiff.lora import ADAPTER, add_adapter
from flashdiff.parts import PartSpec
from flashdiff.prediction import to_x0
from flashdiff.rows import shape_of
from flashdiff.schedule import Schedule

# --- its LoRAs ------------------------------------------------------------------------------------------------------


def add_lora(model: TorchModel, family: ModelFamily, recipe: LoraRecipe, *, seed: int, name: str = ADAPTER) -> None:
    """Put a trainable LoRA into the network, as the recipe or the family says."""
    targets: Sequence[str] = recipe.targets or family.lora_targets
    if tuple(targets) == EVERY_LAYER:
        layers = {key.replace(".base_layer", "") for key, module in model.network.named_modules() if _takes_lora(key, module)}
        targets = sorted(layers)
    elif unknown := next((key for key in recipe.targets if not _names_layer(key, model.network)), None):
        raise ConfigError(f"lora.targets: no layer is called '{unknown}', nor ends in it")
    add_adapter(model, targets, rank=recipe.rank, alpha=recipe.alpha, seed=seed, name=name, dora=recipe.dora, ranks=recipe.ranks)


EVERY_LAYER = ("all",)


def _names_layer(target: str, network: nn.Module) -> bool:
    """Whether a layer has this name, or one that ends in it; its own name is that of its parent once it has a LoRA."""
    return any(f".{key}".endswith(f".{target}") for key, _ in network.named_modules())


def _takes_lora(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name and getattr(module, "groups", 1) == 1


# --- evaluations -----------------------------------------------------------------------------------------------------


def guided(conditioning: Mapping[str, Tensor], guidance: Tensor) -> Mapping[str, Tensor]:
    """The teacher's conditioning [B, ...]: with its guidance scales [B] in it, where the network takes them as an input."""
    return {**conditioning, GUIDANCE: guidance} if GUIDANCE in conditioning else conditioning


def run_network(model: TorchModel, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's raw output [B, C, h, w] for latents [B, C, h, w] at `times` [B], with the adapters that are active."""
    part = trained_part(model.spec)
    output: Tensor = model.module(part.name)(latents, times, *(conditioning[name] for name in part.inputs[2:]))
    return output


def trained_part(spec: ModelSpec) -> PartSpec:
    """The denoiser that teacher and student run: the one with control networks, where the model has any."""
    return spec.denoisers[-1]


def blank_conditioning(model: TorchModel) -> dict[str, Tensor]:
    """All that the denoiser takes of one sample [1, ...], for the shapes alone: the empty prompt, and zeros of images."""
    spec = model.spec
    found = model.encode_ids(model.tokenizer([""]))
    for condition in spec.conditions:
        if condition.enters == "label":
            found[condition.name] = torch.zeros(1, dtype=torch.int64, device=model.device)
        elif condition.name not in found:
            found[condition.name] = torch.zeros(1, *shape_of(spec, condition, spec.sizes[0]), device=model.device)
        if condition.scaled:
            found[condition.scale_name] = torch.zeros(1, device=model.device)
    return found


def predict_x0(model: TorchModel, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """x_0 [B, C, h, w] of latents [B, C, h, w] at `times` [B], by the denoiser with the adapters that are active."""
    alpha, sigma = levels(model, times)
    return to_x0(model.spec.prediction, run_network(model, latents, times, conditioning), latents, alpha, sigma)


def levels(model: TorchModel, times: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma [B, 1, 1, 1] of `times` [B], on the device of `times`."""
    alpha, sigma = (table.to(times.device)[times].view(-1, 1, 1, 1) for table in _level_tables(model.spec.sampler.schedule))
    return alpha, sigma


@cache
def _level_tables(schedule: Schedule) -> tuple[Tensor, Tensor]:
    alphas, sigmas = schedule.levels(list(range(schedule.num_train_timesteps)))
    return torch.from_numpy(alphas).float(), torch.from_numpy(sigmas).float()


# --- roles: whose weights it has -------------------------------------------------------------------------------------


class Exchange:
    """Parameters of a network, which tensors of the same names can take the place of."""

    def __init__(self, network: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for module in network.modules():
            for key, parameter in module._parameters.items():
                places.setdefault(id(parameter), []).append((module._parameters, key))
        self._places = {name: places[id(parameter)] for name, parameter in parameters.items()}

    @contextmanager
    def held(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context, the network has `weights`, each shaped as the parameter of its name; nothing is copied."""
        own = {name: [of[key] for of, key in places] for name, places in self._places.items()}
        try:
            for name, places in self._places.items():
                for of, key in places:
                    of[key] = weights[name].detach()  # peft says of what lies there whether it takes gradients
            yield
        finally:
            for name, places in self._places.items():
                for (of, key), parameter in zip(places, own[name], strict=True):
                    of[key] = parameter


def _adapts(network: Any) -> bool:
    """Whether the student is an adapter on the network, and not the network itself."""
    return ADAPTER in getattr(network, "peft_config", {})


def as_student(network: Any) -> None:
    """Let the network be the student's again, after another adapter was put in or used."""
    if _adapts(network):
        network.set_adapter(ADAPTER)
    else:
        network.disable_adapters()


@contextmanager
def as_teacher(model: TorchModel) -> Iterator[None]:
    """The frozen base: its own weights, and all adapters off."""
    adapts = _adapts(model.network)
    if adapts:
        model.network.disable_adapters()
    try:
        with model.as_base():
            yield
    finally:
        if adapts:
            model.network.enable_adapters()


@contextmanager
def as_adapter(model: TorchModel, name: str) -> Iterator[None]:
    """The frozen base with the adapter `name` alone; in peft only the active adapter's weights take gradients."""
    if not _adapts(model.network):
        model.network.enable_adapters()
    model.network.set_adapter(name)
    try:
        with model.as_base():
            yield
    finally:
        as_student(model.network)


class Tap:
    """The features of latents at a noise level: outputs of the network's blocks. The network stops at the last of them."""

    def __init__(self, model: TorchModel, family: ModelFamily, *, runs_whole: bool = False, shares: Sequence[float] = ()) -> None:
        """`shares` choose blocks by their place among all; none: the family's own. `runs_whole` where stopping half-way would
        leave other processes waiting. ConfigError where the network has no such blocks."""
        self._model, self._runs_whole = model, runs_whole
        blocks = family.feature_blocks(model.network)
        if shares and not blocks:
            raise ConfigError(
                f"loss.adversarial.taps: the networks of family {family.name} are tapped in one place; leave it out"
            )
        places = sorted({min(int(share * len(blocks)), len(blocks) - 1) for share in shares})
        self._find = lambda network: [family.feature_blocks(network)[place] for place in places] or [family.feature_tap(network)]

    def __call__(self, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> list[Tensor]:
        """Maps [B, C', h', w'] of latents [B, C, h, w] noised to `times` [B]; gradients flow through the network to them.

        The caller chooses the role of the network, with `as_teacher` for the frozen base.
        """
        tapped = self._find(self._model.network)
        caught: list[Tensor] = []

        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            caught.append(output[-1] if isinstance(output, tuple) else output)  # text comes first, the image last
            if len(caught) == len(tapped) and not self._runs_whole:
                raise _TappedError(output)

        handles = [module.register_forward_hook(catch) for module in tapped]
        try:
            with suppress(_TappedError):
                run_network(self._model, latents, times, conditioning)
        finally:
            for handle in handles:
                handle.remove()
        followed = 1 + sum(condition.enters == "sequence" for condition in self._model.spec.conditions)
        return [_as_map(features, latents, images=followed).float() for features in caught]


class _TappedError(Exception):
    """Ends a forward pass whose features are all there."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _as_map(features: Tensor, latents: Tensor, *, images: int) -> Tensor:
    """A transformer's tokens [B, N, C] as a map, in rows as long as the image is wide; a map as it is.

    The tokens are those of so many `images` of one size, the denoised one first, which alone is kept.
    """
    if features.ndim != 3:
        return features
    features = features[:, : features.shape[1] // images]
    rows = round((features.shape[1] * latents.shape[2] / latents.shape[3]) ** 0.5)
    return features.transpose(1, 2).unflatten(2, (rows, -1))


# --- device, precision and memory ------------------------------------------------------------------------------------


def place(model: TorchModel, recipe: Recipe) -> None:
    """Move the model to this process's device, where text encoder and network compute in the run's precision.

    The parameters of a network that is to be sharded stay where they are until `shard_base` moves them block by block. Those of
    one that is trained stay in float32.
    """
    device, precision = processes.device(), processes.precision()
    if recipe.int8_base:
        round_to_int8(model.network)
    model.text_encoder.to(device, precision)
    model.decoder.to(device)
    if model.reference_encoder is not None:
        model.reference_encoder.to(device)
    denoisers = {part.name: model.module(part.name) for part in model.spec.denoisers}
    frozen = [*([model.network] if recipe.student == "lora" else []), *model.controls.values()]
    for parameter in (parameter for network in frozen for parameter in network.parameters()):
        if parameter.is_floating_point():  # buffers keep their precision: some hold noise levels
            parameter.data = parameter.data.to(precision)  # before it is moved: the device need not hold it in float32
    inside = {id(module) for module in model.network.modules()}
    for module in (module for denoiser in denoisers.values() for module in denoiser.modules()):
        if not recipe.shard_base or id(module) not in inside:
            _move(module, device)
    if precision != torch.float32:
        for name, denoiser in denoisers.items():
            setattr(model, name, _InPrecision(denoiser, precision))


def _move(module: nn.Module, device: torch.device) -> None:
    """Move a module's own parameters and buffers, and not those of the modules in it."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, buffer.to(device))


class _InPrecision(nn.Module):
    """Computes in a lower precision and returns float32; trained parameters stay in float32."""

    def __init__(self, denoiser: nn.Module, precision: torch.dtype) -> None:
        super().__init__()
        self.denoiser, self.precision = denoiser, precision

    def forward(self, latents: Tensor, *inputs: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, self.precision):
            output: Tensor = self.denoiser(latents, *inputs)
        return output.float()


_Roles = tuple[list[tuple[bool, list[str]]], list[Tensor]]
"""Whether each adapter layer is off and which adapters it uses, and the tensors in the places of those that are trained."""


def checkpoint_gradients(model: TorchModel) -> None:
    """Keep no activations inside the network's blocks, but recompute them in the backward pass.

    The network may have another role by then, so each block restores the role of its forward pass.
    """
    modules = list(model.network.modules())
    adapters = [module for module in modules if isinstance(module, BaseTunerLayer)]
    places = [(module._parameters, key) for module in modules for key in module._parameters]
    trained = [(of, key) for of, key in places if (p := of[key]) is not None and p.requires_grad]

    def roles() -> _Roles:
        states = [(module._disable_adapters, module._active_adapter) for module in adapters]
        return states, [of[key] for of, key in trained]  # type: ignore[return-value]

    def set_roles(values: _Roles) -> None:
        for module, (disabled, active) in zip(adapters, values[0], strict=True):
            # Not through peft's setters: they would also change which weights take gradients, in the middle of a backward pass.
            module._disable_adapters, module._active_adapter = disabled, active
        for (of, key), parameter in zip(trained, values[1], strict=True):
            of[key] = parameter

    @contextmanager
    def recomputing(before: _Roles) -> Iterator[None]:
        now = roles()
        set_roles(before)
        try:
            yield
        finally:
            set_roles(now)

    def run(module: Callable[..., Any], *inputs: Any) -> Any:
        before = roles()
        tapped: list[_TappedError] = []

        def block(*inputs: Any) -> Any:
            try:
                return module(*inputs)
            except _TappedError as error:  # held until the block's activations are accounted for
                tapped.append(error)
                return error.output

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), recomputing(before)

        output = checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)
        if tapped:
            raise tapped[0]
        return output

    model.network.enable_gradient_checkpointing(run)


def shard_base(model: TorchModel) -> None:
    """Spread the frozen base over the processes with FSDP2; each process gathers a block while it runs it.

    The adapters stay whole in every process: they are small, and their gradients are averaged as without sharding. From then
    on all processes must evaluate the network equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    adapters = {p for name, p in model.network.named_parameters() if ".lora_" in name}
    for parameter in adapters:
        parameter.data = parameter.data.to(processes.device())
    mesh = init_device_mesh(processes.device().type, (processes.count(),))
    blocks = set(model.network._no_split_modules or ())
    for module in reversed(list(model.network.modules())):  # inner modules first
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, ignored_params=adapters)
    fully_shard(model.network, mesh=mesh, ignored_params=adapters)
