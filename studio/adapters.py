"""Trains the adapters of the small model, person and pet, by the pack's own training."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from PIL import Image

from nested_attention.host.base import Base
from nested_attention.host.objective import DiffusionObjective
from nested_attention.host.train import ADAPTER, train
from nested_attention.training.config import TrainingConfig

from .animals import KINDS
from .pictures import VIEWS
from .scenes import World
from .warm_start import warm_start

CLASSES = {"people": "person", "animals": "pet"}
PAIRS = 4000
COMPANY = {"people": (("people", "animals"), ("people", "people")), "animals": (("people", "animals"),)}


def make_pairs(world: World, kind: str, folder: Path, pairs: int = PAIRS) -> Path:
    """A dataset as docs/training.md describes it: scenes with somebody, and a photo of the same one in another view.

    No caption tells what the subject looks like: that is the photo's to say.
    """
    listing = folder / "pairs.jsonl"
    if listing.exists():
        return listing
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(f"pairs {kind}")
    lines = []
    for i in range(pairs):
        kinds = (kind,) if rng.random() < 0.7 else rng.choice(COMPANY[kind])
        scene = world.scene(rng, kinds=kinds, told=0.0)
        subject = next(figure for figure in scene.figures if figure.kind == kind)
        view = rng.choice([v for v in range(VIEWS) if v != subject.view])
        names = {"image": f"{i:05d}.png", "crop": f"{i:05d}.subject.png"}
        Image.fromarray(scene.picture).save(folder / names["image"])
        Image.fromarray(world.portrait(kind, subject.number, view, rng)).save(folder / names["crop"])
        lines.append(json.dumps({**names, "caption": as_class(scene.caption, kind)}))
    listing.write_text("\n".join(lines) + "\n")
    return listing


def as_class(caption: str, kind: str) -> str:
    """The kind of animal is part of who it is: a caption calls the subject by its class."""
    if kind == "animals":
        caption = " ".join("pet" if word in KINDS else word for word in caption.split())
    return caption


def settings(kind: str, data: Path, output: Path, steps: int, **changes: object) -> TrainingConfig:
    values = {
        "data": str(data), "output": str(output), "class_word": CLASSES[kind], "resolution": 64, "buckets": False,
        "queries": 32, "dim": 160, "depth": 3, "dim_head": 32, "ff_mult": 2, "norm": "off", "value_share": 0.15,
        "steps": steps, "batch": 16, "learning_rate": 2e-3, "schedule": "cosine", "qformer_rate": 0.05, "warmup": 50,
        "ema": 0.995, "precision": "fp32", "gradient_checkpointing": False, "cache": "memory", "augment": 0.5,
        "log_every": 20, "checkpoint_every": 100, "validate_every": 10**6,
    }  # fmt: skip
    return TrainingConfig(**{**values, **changes})


def train_adapter(
    world: World,
    base: Base,
    kind: str,
    work: Path,
    steps: int,
    before: int,
    *,
    name: str = "",
    objective: type[DiffusionObjective] = DiffusionObjective,
    **changes: object,
) -> Path:
    """The adapter's file; goes on from a checkpoint in its folder, which has its name, or that of the class.

    before   steps of its warm start, which those share that have the same Q-Former and image features
    """
    output = work / "adapters" / (name or CLASSES[kind])
    data = make_pairs(world, kind, work / "pairs" / kind)
    if not (output / ADAPTER).exists():
        config = settings(kind, data, output, steps, **changes)
        start_folder = work / "starts" / f"{kind}-{config.queries}-{config.feature_layer}"
        start = warm_start(world, base, kind, config, start_folder, before)
        train(config, base, start=start, objective=objective)
    return output / ADAPTER
