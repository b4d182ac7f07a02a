"""One training loop for all parts of the small model: resumable at any moment, with a running mean of the weights."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
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

    batch    samples of a step, of all processes
    slower   factors on the rate of the parameters whose names begin so
    """

    steps: int
    batch: int
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


Batch = dict[str, Tensor]


def half(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bf16, on GPUs, and on CPUs that compute in it; others are slower in it than in fp32."""
    able = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and able)


def share(batch: int) -> int:
    """How many samples of a step's batch are this process's."""
    return batch // rank_and_size()[1]


SAVE_AFTER = 30.0  # seconds
TIMES, KEPT = 4, 1000  # a GPU sees each batch so often, for it is faster than what draws them; so many are kept there


def batch_number(step: int) -> int:
    """Of a GPU's step: a fresh one for every fourth, for the others any of the last ones."""
    newest = step // TIMES
    return Random(step).randint(max(0, newest - KEPT + 1), newest) if step % TIMES else newest


def repeated(made: Iterable[Batch], numbers: Iterable[int]) -> Iterator[Batch]:
    """The batches of these numbers, each taken from `made` when it is first needed, and kept while it may be again."""
    kept, made = {}, iter(made)
    for number in numbers:
        if number not in kept:
            kept[number] = next(made)
            if len(kept) > KEPT:
                kept.pop(min(kept))
        yield kept[number]


@dataclass
class Recorded:
    """What is done with a batch on a GPU, recorded as a CUDA graph after the first few, and from then on replayed.

    Python needs many times as long to start the thousands of kernels of a step of these small models as they take. All
    batches must have the same shapes, and nothing may be read back; what is returned holds until the next call.
    """

    function: Callable[[Batch], dict[str, Tensor]]
    calls: int = 0

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == 1:
            self.batch, self.stream = {name: value.clone() for name, value in batch.items()}, torch.cuda.Stream()
        for name, value in batch.items():
            self.batch[name].copy_(value)
        if self.calls < 4:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                found = self.function(self.batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return found
        if self.calls == 4:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.found = self.function(self.batch)
        self.graph.replay()
        return self.found


@dataclass(frozen=True)
class Batches(Dataset[Batch]):
    """Batches by their number, from which alone all chance in them comes."""

    make: Callable[[int], Batch]

    def __getitem__(self, number: int) -> Batch:
        return self.make(number)


def train(
    module: nn.Module,
    batch_of: Callable[[int], Batch],
    losses_of: Callable[[Batch], dict[str, Tensor]],
    plan: Plan,
    folder: Path,
) -> nn.Module:
    """Train in place, on the host's device, and return the running mean of the module on the CPU.

    Processes of torchrun, on a CPU, each take a part of a step's batch and average the gradients: two of one thread
    each are twice as fast as one of two. A GPU would wait for them: for it, batches are made by processes of their own
    and come several times, and a step is one CUDA graph.

    batch_of    of its number, from which all chance in it comes; made on the CPU, perhaps in a forked process; all of
                one shape
    losses_of   of a batch, named; their sum is what falls. On a GPU it may not read anything back
    folder      of `state.pt`, from which an interrupted training goes on, and `log.jsonl`
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank, processes = rank_and_size()
    device = get_torch_device()
    module.to(device)
    mean = copy.deepcopy(module).requires_grad_(False)
    on_gpu = device.type == "cuda"
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        factor = next((f for prefix, f in plan.slower.items() if name.startswith(prefix)), 1.0)
        groups.setdefault(factor, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "factor": factor, "lr": torch.tensor(plan.rate, device=device) if on_gpu else plan.rate}
            for factor, members in groups.items()
        ],
        weight_decay=plan.decay, betas=(0.9, 0.99), fused=True, capturable=on_gpu,
    )  # fmt: skip
    step, state_file = 0, folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        module.load_state_dict(state["module"])
        mean.load_state_dict(state["mean"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    numbers = range(step * processes + rank, plan.steps * processes, processes)
    if on_gpu:
        numbers = [batch_number(each) for each in range(step, plan.steps)]
    helpers = max(1, (os.cpu_count() or 1) - 2) if on_gpu and hasattr(os, "fork") else 0
    loader = DataLoader(
        Batches(batch_of), batch_size=None, sampler=list(dict.fromkeys(numbers)), num_workers=helpers,
        multiprocessing_context="fork" if helpers else None,
    )  # fmt: skip
    batches = ({name: value.to(device) for name, value in batch.items()} for batch in loader)

    def learn(batch: Batch) -> dict[str, Tensor]:
        optimizer.zero_grad()
        losses = losses_of(batch)
        sum(losses.values()).backward()
        if processes > 1:
            average_gradients(parameters, processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    if on_gpu:
        batches, learn = repeated(batches, numbers), Recorded(learn)
    since = saved = time.monotonic()
    first = step
    for batch in batches:
        for group in optimizer.param_groups:
            rate = plan.at(step) * group["factor"]
            group["lr"] = group["lr"].fill_(rate) if on_gpu else rate
        torch.manual_seed(step * processes + rank)  # of noise and dropout
        losses = learn(batch)
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
            state = {"step": step, "batch": plan.batch, **{k: v.state_dict() for k, v in parts.items()}}
            write_atomically(state_file, lambda file: torch.save(state, file))  # noqa: B023
            saved = time.monotonic()
    return mean.cpu()


def trained_for(folder: Path) -> dict[str, int]:
    """The steps of what was trained there, and the samples of each."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return {"steps": state["step"], "batch": state["batch"]}


def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    gradients = [p.grad for p in parameters if p.grad is not None]
    joined = torch.cat([g.flatten() for g in gradients]) / processes
    dist.all_reduce(joined)
    for gradient, part in zip(gradients, joined.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
