"""A whole training: settings and a base model in, an adapter file out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from ..adapter import NestedAdapter
from ..files import load_adapter, save_adapter
from ..training.config import TrainingConfig, TrainingError
from ..training.data import Entry, Reader, Row, Sample, Troubles, read_dataset, stable_hash
from ..training.trainer import Trainer, world
from .base import Base, checkpointed, fresh_adapter
from .layers import check_fit, cross_attention_sites
from .training import DiffusionObjective
from .validation import Validation

log = logging.getLogger("nested_attention")


def train(config: TrainingConfig, base: Base, *, stop: Callable[[], bool] = lambda: False) -> bool:
    """Train on a base model and write output/adapter.safetensors; whether `stop` did not end it before its last step.

    Raises TrainingError.
    """
    adapter = make_adapter(config, base)
    troubles = Troubles(config.on_error)
    entries, kept_apart = split(read_dataset(config, troubles), config)
    log.info("%d pictures to train on, %d to validate on, %d left out.", len(entries), len(kept_apart), troubles.count)
    unet = base.model.model.diffusion_model
    with base.frozen(), checkpointed(unet) if config.gradient_checkpointing else nullcontext():
        objective = DiffusionObjective(base, adapter, config)
        reader = Reader(entries, config, troubles, world()[1])
        validate = Validation(config, objective, fixed_samples(kept_apart, config, troubles)) if kept_apart else None
        trainer = Trainer(config, adapter, objective, reader, troubles, validate=validate)
        finished = trainer.run(stop)
    if finished and world()[0] == 0:
        path = Path(config.output) / "adapter.safetensors"
        save_adapter(trainer.average, path, notes={"training": record(config, trainer, len(entries))})
        log.info("Done: %s. Put it into ComfyUI's models/nested_attention.", path)
    return finished


def make_adapter(config: TrainingConfig, base: Base) -> NestedAdapter:
    """A fresh adapter or the one to start from, in fp32 on the base model's device."""
    if config.start_from:
        adapter = load_adapter(config.start_from)
        sites = cross_attention_sites(base.model.model.diffusion_model)
        check_fit(adapter.config, sites, Path(config.start_from).name)
    else:
        adapter = fresh_adapter(config, base)
    adapter = adapter.to(base.model.load_device, torch.float32).requires_grad_(True).train()
    adapter.embeddings.requires_grad_(False)
    return adapter


def split(entries: list[Entry], config: TrainingConfig) -> tuple[list[Entry], list[Entry]]:
    """Entries to train on and to validate on; which ones goes by the seed and their names."""
    if config.holdout >= len(entries):
        raise TrainingError(f"holdout is {config.holdout}, but the data holds only {len(entries)} usable entries.")
    order = sorted(entries, key=lambda e: stable_hash(config.seed, e.image.name, e.caption, e.box))
    apart = order[: config.holdout]
    return [e for e in entries if e not in apart], apart


def fixed_samples(entries: list[Entry], config: TrainingConfig, troubles: Troubles) -> list[Sample]:
    """One sample of each entry, without augmentation or dropout."""
    plain = replace(config, augment=0.0, caption_dropout=0.0, subject_dropout=0.0)
    reader = Reader(entries, plain, troubles)
    places = [(size, i) for size, members in reader.plan.buckets.items() for i in members]
    # Negative numbers: the objective remembers by entry, and these are others than those trained on.
    samples = [reader(Row(i, size, stable_hash(config.seed, "validation", i))) for size, i in places]
    return [replace(s, row=replace(s.row, entry=-1 - s.row.entry)) for s in samples]


def record(config: TrainingConfig, trainer: Trainer, entries: int) -> str:
    """What an adapter file tells of its making."""
    facts = {"steps": trainer.step, "entries": entries, "skipped": trainer.troubles.count}
    return json.dumps({**facts, "processes": trainer.processes, "settings": config.record()})
