"""One training loop for all parts of the small model: resumable at any moment, with a running mean of the weights."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from comfy.clip_model import CLIPLayer
from comfy.model_management import get_torch_device
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nested_attention.files import write_atomically
from nested_attention.training.processes import rank_and_size


@dataclass(frozen=True)
class Plan:
    """steps of AdamW: the rate rises over `warmup`, then falls along a cosine to a twentieth.

    slower   factors on the rate of the parameters whose names begin so
    """

    steps: int
    rate: float = 1e-3
    slower: Mapping[str, float] = field(default_factory=dict)
    warmup: int = 100
    decay: float = 0.01
    ema: float = 0.998

    def at(self, step: int) -> float:
        fall = 0.05 + 0.95 * (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.rate * min(1.0, (step + 1) / self.warmup) * fall


def initialize(module: nn.Module) -> None:
    """Fresh weights: the host's layers leave them undefined, since it always reads them from files."""
    known = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    for layer in module.modules():
        for kind in known:
            if isinstance(layer, kind):
                kind.reset_parameters(layer)


def differentiable(module: nn.Module) -> None:
    """The host's CLIP layers add in place, over what their gradients need; these do not."""
    for layer in module.modules():
        if isinstance(layer, CLIPLayer):
            layer.forward = MethodType(clip_layer, layer)


def clip_layer(self: CLIPLayer, x: Tensor, mask: Tensor | None = None, optimized_attention: Any = None) -> Tensor:
    x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
    return x + self.mlp(self.layer_norm2(x))


def half(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bf16, on GPUs, and on CPUs that compute in it; others are slower in it than in fp32."""
    able = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and able)


def share(batch: int) -> int:
    """How many samples of a step's batch are this process's."""
    return batch // rank_and_size()[1]


Batch = dict[str, Tensor]
SAVE_AFTER = 30.0  # seconds


@dataclass(frozen=True)
class Batches(Dataset[Batch]):
    """Batches by their number, from which alone all chance in them comes."""

    make: Callable[[int, torch.Generator], Batch]

    def __getitem__(self, number: int) -> Batch:
        return self.make(number, torch.Generator().manual_seed(number))


def train(
    module: nn.Module,
    batch_of: Callable[[int, torch.Generator], Batch],
    losses_of: Callable[[Batch], dict[str, Tensor]],
    plan: Plan,
    folder: Path,
) -> nn.Module:
    """Train in place, on the host's device, and return the running mean of the module on the CPU.

    Processes of torchrun, on a CPU, each take a part of a step's batch and average the gradients: two of one thread
    each are twice as fast as one of two. Where a GPU would wait for them, batches are made by processes of their own.

    batch_of    of its number and its random numbers; made on the CPU, perhaps in a forked process
    losses_of   of a batch, named; their sum is what falls
    folder      of `state.pt`, from which an interrupted training goes on, and `log.jsonl`
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, processes = rank_and_size()
    device = get_torch_device()
    module.to(device)
    mean = copy.deepcopy(module).requires_grad_(False)
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        factor = next((f for prefix, f in plan.slower.items() if name.startswith(prefix)), 1.0)
        groups.setdefault(factor, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": members, "factor": factor} for factor, members in groups.items()],
        plan.rate, weight_decay=plan.decay, betas=(0.9, 0.99), fused=True,
    )  # fmt: skip
    step, state_file = 0, folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        module.load_state_dict(state["module"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    numbers = range(step * processes + rank, plan.steps * processes, processes)
    helpers = max(1, (os.cpu_count() or 1) // 4) if device.type == "cuda" and hasattr(os, "fork") else 0
    batches = DataLoader(
        Batches(batch_of), batch_size=None, sampler=numbers, num_workers=helpers, pin_memory=helpers > 0,
        multiprocessing_context="fork" if helpers else None,
    )  # fmt: skip
    since = saved = time.monotonic()
    first = step
    for batch in batches:
        for group in optimizer.param_groups:
            group["lr"] = plan.at(step) * group["factor"]
        torch.manual_seed(step * processes + rank)  # of dropout
        losses = losses_of({name: value.to(device, non_blocking=True) for name, value in batch.items()})
        sum(losses.values()).backward()
        if processes > 1:
            average_gradients(parameters, processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        keep = min(plan.ema, step / (step + 10))
        torch._foreach_lerp_(list(mean.parameters()), [p.detach() for p in module.parameters()], 1 - keep)
        if rank == 0 and (step % 20 == 0 or step == plan.steps):
            found = {name: round(value.item(), 5) for name, value in losses.items()}
            line = {"step": step, **found, "seconds_a_step": round((time.monotonic() - since) / (step - first), 3)}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
        if rank == 0 and (time.monotonic() - saved > SAVE_AFTER or step == plan.steps):
            parts = {"module": module, "mean": mean, "optimizer": optimizer}
            state = {"step": step, **{k: v.state_dict() for k, v in parts.items()}}
            write_atomically(state_file, lambda file: torch.save(state, file))  # noqa: B023
            saved = time.monotonic()
    return mean.cpu()


def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    joined = torch.cat([g.flatten() for g in gradients]) / processes
    dist.all_reduce(joined)
    for gradient, part in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
