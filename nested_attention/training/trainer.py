"""The training loop. It knows the adapter and a loss; the base model is behind the loss.

All chance lies in the rows, by their number: so a checkpoint is weights, moments and a step, and a training that was
killed goes on as if nothing had happened. Processes share the rows of each batch and average the gradients.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from ..adapter import NestedAdapter, fingerprint
from .checkpoint import load_checkpoint, save_checkpoint
from .config import TrainingConfig, TrainingError, changed
from .processes import rank_and_size
from .progress import Progress
from .samples import Reader, Sample
from .troubles import BrokenEntry, Troubles

log = logging.getLogger("nested_attention")
Pairs = list[tuple[Tensor, Tensor]]
Project = Callable[[Tensor], Pairs]
Objective = Callable[[Project, Sequence[Sample]], Tensor]


class Projector(nn.Module):
    """All of an adapter in one forward, as gradients are averaged between processes around a forward."""

    def __init__(self, adapter: NestedAdapter, checkpointing: bool = False):
        super().__init__()
        self.adapter, self.checkpointing = adapter, checkpointing

    def forward(self, features: Tensor) -> Pairs:
        """Image features [B, I, image_dim] to each layer's Kn and Vn, [B, M, inner]."""
        tokens = self.adapter.resampler(features)
        if not self.checkpointing:
            return [layer(tokens) for layer in self.adapter.layers]
        # Autocast would keep the tokens once more for each layer.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        return [again(layer, tokens) for layer in self.adapter.layers]


class Trainer:
    """Trains an adapter in place; `average` is its running mean (EMA), which is what is saved in the end.

    base        fingerprint of the base model, or nothing where it has none; told of when another goes on
    objective   loss of some samples, given the function from image features to nested keys and values
    validate    called with the step and the averaged adapter; what it returns is recorded
    watch       called with each step that is done and its line for the log
    """

    def __init__(
        self,
        config: TrainingConfig,
        adapter: NestedAdapter,
        objective: Objective,
        reader: Reader,
        troubles: Troubles,
        *,
        base: str = "",
        validate: Callable[[int, NestedAdapter], dict[str, float]] | None = None,
        watch: Callable[[int, str], None] = lambda step, line: None,
    ):
        self.config, self.objective, self.reader, self.troubles = config, objective, reader, troubles
        self.base, self.validate, self.watch = base, validate, watch
        self.rank, self.processes = rank_and_size()
        self.adapter, self.average = adapter, copy.deepcopy(adapter).requires_grad_(False)
        self.start = fingerprint(adapter.state_dict()) if config.start_from else ""  # all such files have one name
        self.parameters = [p for p in adapter.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.project: nn.Module = Projector(adapter, config.gradient_checkpointing)
        if self.processes > 1:
            self.project = nn.parallel.DistributedDataParallel(
                self.project, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            for buffer in adapter.buffers():
                dist.broadcast(buffer, 0)
        groups = self.groups()
        self.factors = [factor for factor, _ in groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": members} for _, members in groups],
            config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda" or None,  # others make a copy of all moments in each step
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.step = self.began = 0
        self.skipped: set[int] = set()  # entries that any process has found broken, now or before an interruption
        self.checkpoint = Path(config.output) / "checkpoint.pt"

    def run(self, stop: Callable[[], bool] = lambda: False, interrupts: tuple[type[BaseException], ...] = ()) -> bool:
        """Train to the last step, from the folder's checkpoint if there is one; whether `stop` did not end it before.

        interrupts   what somebody else may raise inside of a step: it comes out when the steps done are kept

        Raises TrainingError where the loss is no number, or at the first trouble if so configured.
        """
        if self.checkpoint.exists():
            self.restore(load_checkpoint(self.checkpoint))
        self.began = self.step
        if self.mean(torch.tensor(float(self.step), device=self.device)).item() != self.step:
            raise TrainingError(
                f"The processes see different checkpoints in {self.checkpoint.parent}. Put output into a folder that "
                "all machines share."
            )
        c = self.config
        progress = (
            Progress(Path(c.output), steps=c.steps, step=self.step, log_every=c.log_every) if self.leads else None
        )
        with ExitStack() as stack:
            if progress is not None:
                stack.callback(progress.close)
            batches = self.batches(stack)
            while self.step < c.steps:
                try:
                    loss, stopped = self.train_step(batches, stop())
                    self.note(progress, loss)
                except (BrokenEntry, torch.OutOfMemoryError, *interrupts):
                    if self.step:
                        self.keep(progress)
                    raise
                if stopped or self.step == c.steps or self.step % c.checkpoint_every == 0:
                    self.gather_skipped()
                    self.keep(progress)
                    if self.processes > 1:
                        dist.barrier()
                if stopped:
                    return False
        return True

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Factors on the learning rate, and which parameters they are for: in the order of `parameters`."""
        qformer = set(self.adapter.resampler.parameters())
        of_qformer, rest = ([p for p in self.parameters if (p in qformer) == is_of] for is_of in (True, False))
        return [(self.config.qformer_rate, of_qformer), (1.0, rest)]

    def rate(self) -> float:
        """The learning rate of the next step."""
        c = self.config
        if self.step < c.warmup:
            return c.learning_rate * (self.step + 1) / c.warmup
        fall = (self.step - c.warmup) / max(1, c.steps - c.warmup) if c.schedule == "cosine" else 0.0
        return c.learning_rate * (1 + math.cos(math.pi * fall)) / 2

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def batches(self, stack: ExitStack) -> Iterator[list[Sample]]:
        """This process's part of each micro-batch from the current step on, read ahead in threads."""
        pool = stack.enter_context(ThreadPoolExecutor(min(16, os.cpu_count() or 1)))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        number = self.step * self.config.accumulation
        ahead: list[list[Future[Sample]]] = []
        while True:
            while len(ahead) <= self.config.prefetch:
                rows = self.reader.plan.rows(number)[self.rank :: self.processes]
                ahead.append([pool.submit(self.reader, row) for row in rows])
                number += 1
            yield [sample.result() for sample in ahead.pop(0)]

    def train_step(self, batches: Iterator[list[Sample]], stop: bool = False) -> tuple[float, bool]:
        """One step of the optimizer. Returns its loss, and whether any process wants to stop."""
        rate = self.rate()
        for group, factor in zip(self.optimizer.param_groups, self.factors, strict=True):
            group["lr"] = rate * factor
        total = torch.zeros((), device=self.device)
        for i in range(self.config.accumulation):
            last = i == self.config.accumulation - 1
            with nullcontext() if last or self.processes == 1 else self.project.no_sync():
                loss = self.objective(self.project, next(batches)) / self.config.accumulation
                self.scaler.scale(loss).backward()
            total += loss.detach()
        result, stopped = self.mean(torch.stack((total, total.new_tensor(float(stop))))).tolist()
        self.require_finite("loss", result)
        self.update()
        return result, stopped > 0

    def require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = " The last checkpoint is from before." if self.checkpoint.exists() else ""
            half = ", or use bf16 or fp32 in place of fp16" if self.config.precision == "fp16" else ""
            raise TrainingError(f"The {what} of step {self.step + 1} is {value}.{kept} Lower the learning rate{half}.")

    def mean(self, values: Tensor) -> Tensor:
        """Over the processes."""
        if self.processes > 1:
            dist.all_reduce(values)
        return values / self.processes

    @torch.no_grad()
    def update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm or math.inf)
        if not self.scaler.is_enabled():  # or it leaves such steps out by itself
            self.require_finite("gradient", norm.item())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        # The mean follows closely at first, or short trainings would keep their beginning in it.
        decay = min(self.config.ema, self.step / (self.step + 10))
        get_ema_multi_avg_fn(decay)(list(self.average.parameters()), list(self.adapter.parameters()), None)

    def note(self, progress: Progress | None, loss: float) -> None:
        """Record a step and, when it is time, validate. Only the first process does."""
        if progress is None:
            return
        values = {"loss": loss, "rate": self.optimizer.param_groups[-1]["lr"]}
        due = self.step % self.config.validate_every == 0 or self.step == self.config.steps
        try:
            if self.validate is not None and due:
                self.guard("The validation", lambda: values.update(self.validate(self.step, self.average)))
        finally:  # the step is done even where its validation is interrupted
            self.guard("The losses", lambda: progress.add(self.step, **values))
        self.watch(self.step, progress.line({"step": self.step, **values}))

    def gather_skipped(self) -> None:
        """Of all processes, each of which comes upon others; all have to call it."""
        found = [self.reader.broken] * self.processes
        if self.processes > 1:
            dist.all_gather_object(found, self.reader.broken)
        self.skipped.update(*found)

    def keep(self, progress: Progress | None) -> None:
        if progress is not None:
            self.guard("The checkpoint", lambda: save_checkpoint(self.checkpoint, self.state()))
            self.guard("The loss curve", progress.draw, needed=False)

    def guard(self, what: str, write: Callable[[], Any], needed: bool = True) -> None:
        """A write that fails stops or is counted; one that is not needed to go on is only told of."""
        try:
            write()
        except OSError as error:
            trouble = f"{what} of step {self.step} could not be written: {error}."
            if not needed:
                log.warning(trouble)
                return
            kept = " The checkpoint before it is still there." if self.checkpoint.exists() else ""
            self.troubles.report(trouble + kept)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "settings": self.config.record(),
            "processes": self.processes,
            "entries": self.reader.fingerprint,
            "skipped": sorted(self.skipped | self.reader.broken),
            "base": self.base,
            "start": self.start,
            "adapter": self.adapter.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; says what makes it another training.

        Raises TrainingError where it is of another adapter, or began from another one.
        """
        began, start = state["settings"].get("start_from", ""), self.config.record()["start_from"]
        if start not in ("", began):
            raise TrainingError(
                f"The training in {self.checkpoint.parent} began from {began or 'a fresh adapter'}, not from {start}. "
                "Choose another output folder (of the node: name) to begin from it."
            )
        self.config = replace(self.config, start_from=began)  # which its record goes on to tell
        different = changed(state["settings"], self.config)
        known = state.get("start") or self.start
        if start and known != self.start:
            different.append(f"another {start} to start from")
        self.start = known
        if state["entries"] != self.reader.fingerprint:
            different.append("other entries in the data")
        else:
            self.skipped.update(state.get("skipped", ()))
        if self.base and state.get("base", "") not in ("", self.base):
            different.append("another base model")
        if state["processes"] != self.processes:
            different.append(f"processes: {self.processes}, was {state['processes']}")
        going_on = self.leads and state["step"] < self.config.steps
        if going_on:
            log.info("Going on from step %d of %s; another output begins anew.", state["step"], self.checkpoint.parent)
        if going_on and different:
            log.warning(
                "The training in %s goes on with other settings than it had: %s. Another output (of the node: name) "
                "begins anew.",
                self.checkpoint.parent,
                "; ".join(different),
            )
        try:
            self.adapter.load_state_dict(state["adapter"])
            self.average.load_state_dict(state["average"])
        except RuntimeError as error:
            same = f"begin from {began} again, or choose" if began and not start else "choose"
            raise TrainingError(
                f"The checkpoint in {self.checkpoint.parent} is of an adapter of another shape: {same} another output "
                f"folder (of the node: name) for a new training. ({'; '.join(different)})"
            ) from error
        groups = self.optimizer.state_dict()["param_groups"]  # rates and decay are the settings' own
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if state["scaler"]:  # that of a precision without scaling is empty
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
