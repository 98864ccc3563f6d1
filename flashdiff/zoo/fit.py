"""How the embedded networks are fitted: Muon and AdamW, a cosine, an average of the weights, resumable."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from flashdiff.checkpoint import load_state, save_state
from flashdiff.config import Record
from flashdiff.errors import TrainingError, first_line

_CHECKPOINT_EVERY = 250


def device() -> torch.device:
    """What networks are fitted on: an NVIDIA GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class StageRecipe(Record):
    batch_size: int = Field(ge=1, le=2**20)
    images: int = Field(ge=1, le=10**12)
    """Training length: images seen, counting repeats."""
    learning_rate: float = Field(gt=0, lt=1)
    """Peak; linear warm-up over 200 updates, then cosine to 1 % of it."""


def fit(
    name: str,
    model: torch.nn.Module,
    loss_of: Callable[[int], Tensor],
    stage: StageRecipe,
    out: Path,
    *,
    ema_decay: float | None,
    report: Callable[[], str],
) -> None:
    """Minimise `loss_of(update)`, a scalar [], in place; with `ema_decay` (per update) the averaged weights remain in the model.

    Losses are of `device()`, where the model is while it learns; it ends on the CPU.

    The state is kept in `out/<name>.pt`: a killed run resumes from there, and a finished one returns at once.
    """
    model.to(device(), memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = Optimizer(model, stage.learning_rate)
    average = {key: value.clone() for key, value in model.state_dict().items()} if ema_decay else {}
    checkpoint, step = out / f"{name}.pt", 0
    if checkpoint.exists():
        state = load_state(checkpoint)
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            average, step = {key: value.to(device()) for key, value in state["average"].items()}, int(state["step"])
        except Exception as error:  # a file that torch can load, but of something else
            raise TrainingError(f"{checkpoint} is no checkpoint of this run ({first_line(error)}); remove it") from None

    total = stage.images // stage.batch_size
    started, first, running = time.monotonic(), step, 0.0
    while step < total:
        loss = loss_of(step)
        loss.backward()
        if not torch.isfinite(loss):
            raise TrainingError(f"{name}, update {step}: the loss is {loss.item()}; the last checkpoint is untouched")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(_annealed(step, total))
        step += 1
        if ema_decay:  # the average starts as a running mean, so the random start does not linger
            decay = min(ema_decay, (1 + step) / (10 + step))
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1 - decay)
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if step % _CHECKPOINT_EVERY == 0 or step == total:
            save_state(
                checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
            )
            rate = (step - first) * stage.batch_size / (time.monotonic() - started)
            left = (total - step) * stage.batch_size / rate / 60
            print(f"{name} {step}/{total} loss {running:.4f} {rate:.0f} images/s, {left:.1f} min left {report()}", flush=True)
    if ema_decay:
        model.load_state_dict(average)
    model.cpu().eval()


class Optimizer:
    """Muon (Jordan et al. 2024) for the kernels, AdamW for the rest.

    In 750 updates of 32 crops Muon brought the embedded autoencoder to 26.5 dB; AdamW came to 23.9, at the best of two rates
    but with twice the latent noise. PyTorch's Muon takes matrices, so each convolution kernel is stepped through a view
    [out, kernel x in] of its own memory, which channels_last makes contiguous.
    """

    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        self.kernels = [p for p in model.parameters() if p.ndim >= 2 and min(p.shape[:2]) >= 16 and id(p) not in embeddings]
        kernels = {id(p) for p in self.kernels}
        self.matrices = [torch.nn.Parameter(_as_matrix(kernel.detach())) for kernel in self.kernels]
        if any(matrix.data_ptr() != kernel.data_ptr() for matrix, kernel in zip(self.matrices, self.kernels, strict=True)):
            raise ValueError("convolution kernels must be in channels_last memory")
        self.muon = torch.optim.Muon(
            self.matrices, lr=learning_rate, momentum=0.9, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw"
        )
        others = [p for p in model.parameters() if id(p) not in kernels]
        self.adam = torch.optim.AdamW(others, lr=learning_rate / 2, betas=(0.9, 0.99), weight_decay=1e-3)

    def step(self, factor: float) -> None:
        """One update at `factor` of the peak learning rate (0 to 1); it uses up the gradients of the model's parameters."""
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else _as_matrix(kernel.grad)
            kernel.grad = None
        for optimizer, peak in ((self.muon, self.learning_rate), (self.adam, self.learning_rate / 2)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def _as_matrix(kernel: Tensor) -> Tensor:
    if kernel.ndim == 2:
        return kernel
    rows: Tensor = kernel.permute(0, 2, 3, 1).reshape(kernel.shape[0], -1)
    return rows


def _annealed(step: int, total: int) -> float:
    warm = min(1.0, (step + 1) / 200)
    return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total)))
