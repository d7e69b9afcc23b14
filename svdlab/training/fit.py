"""One training loop for every network: EMA, progress, and files to resume from."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import NonNegativeInt
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from svdlab.errors import SvdlabError
from svdlab.files import atomic_path
from svdlab.reading import Document, parse_as
from svdlab.svd.checkpoint import open_safetensors
from svdlab.training.recipe import Schedule

# A pure function of the step's generator and of the network's call, so that a resumed run draws what it would have.
Loss = Callable[[Callable[..., Any], torch.Generator], Tensor]
SAVE_EVERY = 100
_MOMENTS = ("exp_avg", "exp_avg_sq")
_DECAY = 0.01
# A weight that has fewer rows or columns is no matrix to make orthogonal.
_MATRIX = 32


@dataclass
class Phase:
    """One network's training.

    Attributes:
        name: of its files and its progress bar.
        network: what is optimised.
        loss: from a call of the network and a generator to a scalar.
        schedule: how it is optimised.
        fingerprint: what the result depends on; a file with another one is not resumed from.
    """

    name: str
    network: nn.Module
    loss: Loss
    schedule: Schedule
    fingerprint: str


@torch.enable_grad()
def fit(phase: Phase, folder: Path, seed: int, device: torch.device) -> list[float]:
    """Train until the schedule's end, from the last saved step if there is one; leave the averaged weights.

    Weights and moments stay in float32; a network that can do with less says so in its ``forward``.

    Args:
        phase: see there. Its network ends with the moving average of the weights.
        folder: where ``NAME.safetensors`` is kept, for resuming.
        seed: of all draws.
        device: where to train.

    Returns:
        The losses of the steps that this call ran.

    Raises:
        SvdlabError: a file of another recipe, or a loss that is not finite.
    """
    network, schedule = phase.network.to(device).train(), phase.schedule
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema_decay))
    optimizers = _optimizers(network)
    path = folder / f"{phase.name}.safetensors"
    start = _restore(path, phase, averaged, optimizers) if path.exists() else 0
    losses: list[float] = []

    def call(*args: Tensor) -> Any:
        return network(*(a.to(device) for a in args))

    with tqdm(total=schedule.steps, initial=start, desc=phase.name, unit="step", mininterval=2) as bar:
        for step in range(start, schedule.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = schedule.learning_rate * _rate(step, schedule)
            # One generator a step: a resumed run continues with the draws that it would have made.
            entropy = np.random.SeedSequence([seed, zlib.crc32(phase.name.encode()), step])
            generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
            loss = phase.loss(call, generator)
            network.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SvdlabError(f"{phase.name}: the loss of step {step} is {losses[-1]}; the last saved step is kept")
            for optimizer in optimizers:
                optimizer.step()
            averaged.update_parameters(network)
            bar.set_postfix_str(f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f}", refresh=False)
            bar.update()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == schedule.steps:
                _save(path, phase, averaged, optimizers, step + 1)
    network.load_state_dict(averaged.module.state_dict())
    network.eval()
    return losses


class Muon(torch.optim.Optimizer):
    """Steps along the nearest orthogonal matrix to the momentum, as large as AdamW's: for matrices and kernels.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the step's size: Liu et al. 2025,
    arXiv 2502.16982. ``torch.optim.Muon`` takes no kernels, and each matrix by itself.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__(parameters, dict(lr=0.0))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every weight that has a gradient."""
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg"].lerp_(parameter.grad, 0.05)
                    ahead = parameter.grad.lerp(state["exp_avg"], 0.95).flatten(1)
                    alike.setdefault(tuple(ahead.shape), []).append((parameter, ahead))
            for (rows, columns), found in alike.items():
                parameters, directions = zip(*found, strict=True)
                rate = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for parameter, update in zip(parameters, _orthogonal(torch.stack(directions)), strict=True):
                    parameter.mul_(1 - group["lr"] * _DECAY).sub_(update.view_as(parameter), alpha=rate)


def _orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal factor of each matrix (N, R, C), about: five Newton-Schulz steps, which bfloat16 is enough for."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    if _has_fast_bfloat16(x.device):
        x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).float()


def _optimizers(network: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels, AdamW for what is too small or has no columns."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in network.parameters():
        matrix = parameter.ndim > 1 and min(parameter.flatten(1).shape) >= _MATRIX
        (matrices if matrix else others).append(parameter)
    made: list[torch.optim.Optimizer] = []
    if matrices:
        made.append(Muon(matrices))
    if others:
        made.append(torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=_DECAY, fused=True))
    return made


def products_in_bfloat16(device: torch.device) -> torch.autocast:
    """Autocast where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_has_fast_bfloat16(device))


def _has_fast_bfloat16(device: torch.device) -> bool:
    """A CPU without AVX-512 multiplies in bfloat16 several times more slowly than in float32."""
    return device.type != "cpu" or "AVX512" in torch.backends.cpu.get_cpu_capability()


def _rate(step: int, schedule: Schedule) -> float:
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    progress = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _save(
    path: Path, phase: Phase, averaged: AveragedModel, optimizers: Sequence[torch.optim.Optimizer], step: int
) -> None:
    tensors = {f"weights.{k}": v for k, v in phase.network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in averaged.module.state_dict().items()}
    for name, parameter in phase.network.named_parameters():
        state = _optimizer_of(parameter, optimizers).state[parameter]
        tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS if moment in state}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    progress = json.dumps({"step": step, "fingerprint": phase.fingerprint})
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"progress": progress})


class _Progress(Document):
    step: NonNegativeInt
    fingerprint: str


def _optimizer_of(parameter: nn.Parameter, optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    return next(o for o in optimizers if any(p is parameter for p in o.param_groups[0]["params"]))


def _restore(path: Path, phase: Phase, averaged: AveragedModel, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    with open_safetensors(path) as file:
        progress = parse_as(_Progress, (file.metadata() or {}).get("progress", "{}"), f"{path}: progress")
        if progress.fingerprint != phase.fingerprint:
            raise SvdlabError(f"{path}: made by another recipe; give another --work folder, or remove it")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for prefix, module in (("weights.", phase.network), ("average.", averaged.module)):
        try:
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        except RuntimeError:
            raise SvdlabError(
                f"{path}: holds other weights than {phase.name}'s; remove it to train them anew"
            ) from None
    averaged.n_averaged.fill_(progress.step)
    for name, parameter in phase.network.named_parameters():
        moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS if f"{m}.{name}" in tensors}
        if moments:  # weights that never run (the collapsed cross-attention's queries) have none
            state = _optimizer_of(parameter, optimizers).state
            state[parameter] = {"step": torch.tensor(float(progress.step)), **moments}
    return progress.step
