"""The one network behind teacher, student and fake score: which adapter is active, and where and in which precision it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashdiff.components import ModelSpec
from flashdiff.distill import processes
from flashdiff.errors import TrainingError
from flashdiff.families.base import GUIDANCE, ModelFamily, TorchModel
from flashdiff.lora import ADAPTER
from flashdiff.prediction import to_x0
from flashdiff.schedule import Schedule


def check_conditions(spec: ModelSpec) -> None:
    """TrainingError for a base whose network reads images of the request: training samples have texts alone."""
    given = [condition.name for condition in spec.conditions if condition.part is None]
    if given:
        raise TrainingError(
            f"'{spec.name}' takes {', '.join(given)}, which training samples do not have; it can be served as it is"
        )


# --- evaluations -----------------------------------------------------------------------------------------------------


def guided(conditioning: Mapping[str, Tensor], guidance: Tensor) -> Mapping[str, Tensor]:
    """The teacher's conditioning [B, ...]: with its guidance scales [B] in it, where the network takes them as an input."""
    return {**conditioning, GUIDANCE: guidance} if GUIDANCE in conditioning else conditioning


def run_network(model: TorchModel, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """The denoiser's raw output [B, C, h, w] for latents [B, C, h, w] at `times` [B], with the adapters that are active."""
    output: Tensor = model.denoiser(latents, times, *(conditioning[name] for name in model.conditioning))
    return output


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


# --- roles: which adapter is active ----------------------------------------------------------------------------------


@contextmanager
def as_teacher(model: TorchModel) -> Iterator[None]:
    """The frozen base: all adapters off."""
    model.network.disable_adapters()
    try:
        yield
    finally:
        model.network.enable_adapters()


@contextmanager
def as_adapter(model: TorchModel, name: str) -> Iterator[None]:
    """The network with the adapter `name` in place of the student's; in peft only the active adapter's weights take gradients."""
    model.network.set_adapter(name)
    try:
        yield
    finally:
        model.network.set_adapter(ADAPTER)


class Tap:
    """The features of latents at a noise level: the output of the family's tapped module."""

    def __init__(self, model: TorchModel, family: ModelFamily) -> None:
        self._model, self._family = model, family

    def __call__(self, latents: Tensor, times: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """A map [B, C', h', w'] of latents [B, C, h, w] noised to `times` [B]; gradients flow through the network to them.

        The caller chooses the role of the network, with `as_teacher` for the frozen base.
        """
        caught: list[Tensor] = []

        def catch(module: nn.Module, inputs: Any, output: Any) -> None:
            caught.append(output[-1] if isinstance(output, tuple) else output)  # text comes first, the image last

        handle = self._family.feature_tap(self._model.network).register_forward_hook(catch)
        try:
            run_network(self._model, latents, times, conditioning)
        finally:
            handle.remove()
        features = caught[0]
        if features.ndim == 3:  # a transformer's tokens [B, N, C], in rows as long as the image is wide
            rows = round((features.shape[1] * latents.shape[2] / latents.shape[3]) ** 0.5)
            features = features.transpose(1, 2).unflatten(2, (rows, -1))
        return features.float()


# --- device, precision and memory ------------------------------------------------------------------------------------


def place(model: TorchModel, *, whole: bool = True) -> None:
    """Move the model to this process's device, where text encoder and network compute in the run's precision.

    Without `whole`, the network's parameters stay where they are until `shard_base` moves them block by block.
    """
    device, precision = processes.device(), processes.precision()
    model.text_encoder.to(device, precision)
    model.decoder.to(device)
    if whole:
        model.denoiser.to(device)
    for name, buffer in list(model.denoiser.named_buffers(recurse=False)):
        setattr(model.denoiser, name, buffer.to(device))
    if precision != torch.float32:
        for parameter in model.network.parameters():  # buffers keep their precision: some hold noise levels
            parameter.data = parameter.data.to(precision)
        model.denoiser = _InPrecision(model.denoiser, precision)


class _InPrecision(nn.Module):
    """Computes in a lower precision and returns float32; trained parameters stay in float32."""

    def __init__(self, denoiser: nn.Module, precision: torch.dtype) -> None:
        super().__init__()
        self.denoiser, self.precision = denoiser, precision

    def forward(self, latents: Tensor, *inputs: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, self.precision):
            output: Tensor = self.denoiser(latents, *inputs)
        return output.float()


def checkpoint_gradients(model: TorchModel) -> None:
    """Keep no activations inside the network's blocks, but recompute them in the backward pass.

    The network may have another role by then, so each block restores the role of its forward pass.
    """
    adapters = [module for module in model.network.modules() if isinstance(module, BaseTunerLayer)]

    def roles() -> list[tuple[bool, list[str]]]:
        return [(module._disable_adapters, module._active_adapter) for module in adapters]  # type: ignore[misc]

    def set_roles(values: list[tuple[bool, list[str]]]) -> None:
        for module, (disabled, active) in zip(adapters, values, strict=True):
            # Not through peft's setters: they would also change which weights take gradients, in the middle of a backward pass.
            module._disable_adapters, module._active_adapter = disabled, active

    @contextmanager
    def recomputing(before: list[tuple[bool, list[str]]]) -> Iterator[None]:
        now = roles()
        set_roles(before)
        try:
            yield
        finally:
            set_roles(now)

    def run(module: Callable[..., Any], *inputs: Any) -> Any:
        before = roles()

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), recomputing(before)

        return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)

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
