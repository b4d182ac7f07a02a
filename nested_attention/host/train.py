"""A whole training: settings and a base model in, an adapter file out."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from heapq import nsmallest
from pathlib import Path
from typing import Any

import torch
from comfy.model_management import InterruptProcessingException
from safetensors import safe_open

from ..adapter import NestedAdapter, fingerprint
from ..base_models import describe
from ..files import read_adapter, write_adapter
from ..training.config import TrainingConfig, TrainingError
from ..training.entries import Entry, read_dataset
from ..training.gain import folded
from ..training.processes import rank_and_size
from ..training.samples import Reader, Row, Sample, stable_hash
from ..training.trainer import Trainer
from ..training.troubles import BROKEN, Troubles
from .base import DTYPES, Base, checkpointed, fresh_adapter, reading
from .layers import check_fit, cross_attention_sites
from .objective import DiffusionObjective
from .validation import Validation

log = logging.getLogger("nested_attention")
ADAPTER = "adapter.safetensors"
SHAPE = ("queries", "dim", "depth", "dim_head", "ff_mult", "feature_layer", "norm", "norm_factor")  # an adapter's own

Watch = Callable[[int, str, Any], None]


def train(
    config: TrainingConfig,
    base: Base,
    *,
    start: NestedAdapter | None = None,
    stop: Callable[[], bool] = lambda: False,
    watch: Watch = lambda step, line, picture: None,
    objective: type[DiffusionObjective] = DiffusionObjective,
) -> bool:
    """Train on a base model and write output/adapter.safetensors; whether no `stop` ended it before its last step.

    start   an adapter to train further, in place of the file `start_from`
    watch   called with each step, its line for the log and the last validation picture (Pillow's), if any
    objective   another one puts the nested keys and values into the model in another way, to compare with

    Raises TrainingError; and the host's interrupt, after checkpoint and adapter are written as they are by then.
    """
    computed = base.model.model.get_dtype_inference()  # not each device has what is asked for
    config = replace(config, precision=next((name for name, dtype in DTYPES.items() if dtype == computed), "fp32"))
    adapter = make_adapter(config, base, start)
    config = with_shape_of(adapter, config)
    troubles = Troubles(config.on_error)
    entries, kept_apart = split(read_dataset(config, troubles), config)
    left_out = troubles.count
    log.info("%d pictures to train on, %d to validate on, %d left out.", len(entries), len(kept_apart), left_out)
    unet = base.model.model.diffusion_model
    with base.frozen(), checkpointed(unet) if config.gradient_checkpointing else nullcontext():
        loss = objective(base, adapter, config, troubles)
        reader = Reader(entries, config, troubles, rank_and_size()[1], left_out=left_out)
        if config.value_share:
            loss.enlarge_values([reader(row) for row in reader.plan.rows(0)[: config.batch]])
        validate = None
        if rank_and_size()[0] == 0:
            held = list(fixed_samples(kept_apart, config, troubles))
            reader.left_out += len(kept_apart) - len(held)
            validate = make_validation(config, loss, entries, held, troubles)
        told = {"validate": validate, "watch": lambda step, line: watch(step, line, validate and validate.picture)}
        # What patches the weights, such as a LoRA, may be in them by now or not.
        known = "" if base.model.patches else fingerprint(unet.state_dict())
        trainer = Trainer(config, adapter, loss, reader, troubles, base=known, **told)
        try:
            finished = trainer.run(stop, interrupts=(InterruptProcessingException,))
        except InterruptProcessingException:
            if trainer.step:
                write_average(trainer)
            raise
    path = Path(config.output) / ADAPTER
    if trainer.step == trainer.began and steps_of(path) == trainer.step:
        # Its record tells of the settings that it was trained with.
        log.warning(
            "The training in %s had all its steps: %d. Raise steps to go on; another output (of the node: name) begins "
            "anew.",
            path.parent,
            trainer.step,
        )
    elif rank_and_size()[0] == 0:
        write_average(trainer)
        log.info("The adapter of step %d: %s. Put it into ComfyUI's models/nested_attention.", trainer.step, path)
    return finished


def steps_of(path: Path) -> int | None:
    """Of the training that wrote an adapter file, if there is one."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get("training", "{}")).get("steps")


def write_average(trainer: Trainer) -> Path:
    """The averaged adapter as a file of the output folder, with the record of its making."""
    path = Path(trainer.config.output) / ADAPTER
    write_adapter(folded(trainer.average), path, notes={"training": record(trainer)})
    return path


def make_adapter(config: TrainingConfig, base: Base, start: NestedAdapter | None = None) -> NestedAdapter:
    """A fresh adapter or the one to start from, for the settings' class word; in fp32 on the base model's device."""
    if start is not None or config.start_from:
        with reading("start_from", config.start_from):
            adapter = read_adapter(config.start_from) if start is None else copy.deepcopy(start)
        sites = cross_attention_sites(base.model.model.diffusion_model)
        check_fit(adapter.config, sites, Path(config.start_from).name)
        adapter.config = replace(adapter.config, class_word=config.class_word)
    else:
        adapter = fresh_adapter(config, base)
    adapter = adapter.to(base.model.load_device, torch.float32).requires_grad_(True).train()
    adapter.embeddings.requires_grad_(False)
    return adapter


def with_shape_of(adapter: NestedAdapter, config: TrainingConfig) -> TrainingConfig:
    """The settings as they are of this adapter, which keeps its shape; says where another one was asked for."""
    own = {name: getattr(adapter.config, name) for name in SHAPE}
    usual = {f.name: f.default for f in fields(TrainingConfig)}
    asked = {name: getattr(config, name) for name in SHAPE if getattr(config, name) not in (own[name], usual[name])}
    if asked:
        other = "; ".join(f"{name} {own[name]}, not {value}" for name, value in asked.items())
        log.warning("The adapter to start from keeps its own shape: %s.", other)
    return replace(config, **own)


def split(entries: list[Entry], config: TrainingConfig) -> tuple[list[Entry], list[Entry]]:
    """Entries to train on and to validate on; which ones goes by the seed and their names."""
    if config.holdout >= len(entries):
        raise TrainingError(f"holdout is {config.holdout}, but the data holds only {len(entries)} usable entries.")
    apart = nsmallest(config.holdout, entries, key=lambda e: stable_hash(config.seed, e.image.name, e.caption, e.box))
    held = set(apart)
    return [e for e in entries if e not in held], apart


def make_validation(
    config: TrainingConfig,
    objective: DiffusionObjective,
    entries: list[Entry],
    samples: list[Sample],
    troubles: Troubles,
) -> Validation | None:
    """Losses of samples kept apart, and pictures of the first one, or of the first entry where there are none."""
    others = fixed_samples(entries, config, troubles) if config.validation_prompts else iter(())
    shown = samples[0] if samples else next(others, None)
    return Validation(config, objective, samples, shown) if shown else None


def fixed_samples(entries: list[Entry], config: TrainingConfig, troubles: Troubles) -> Iterator[Sample]:
    """One sample of each entry that can be read, without augmentation or dropout."""
    plain = replace(config, batch=1, augment=0.0, caption_dropout=0.0, subject_dropout=0.0)
    reader = Reader(entries, plain, troubles)
    for size, members in reader.plan.buckets.items():
        for i in members:
            try:
                yield reader.read(Row(i, size, stable_hash(config.seed, "validation", i)))
            except BROKEN as error:
                reader.give_up(i, error)


def record(trainer: Trainer) -> str:
    """What an adapter file tells of its making."""
    shape = trainer.adapter.config
    facts = {"base_model": describe(shape.layers, shape.output_dim), "steps": trainer.step}
    skipped = trainer.reader.left_out + len(trainer.skipped | trainer.reader.broken)
    facts |= {"entries": len(trainer.reader.entries), "skipped": skipped}
    return json.dumps({**facts, "processes": trainer.processes, "settings": trainer.config.record()})
