"""Small trainings: pictures with captions, settings, and a base of ComfyUI's real classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_models import make_clip, make_clip_vision, make_model

from nested_attention.host.adapters import BoundSubject, LoadedAdapter
from nested_attention.host.base import Base
from nested_attention.subject import Subject
from nested_attention.training.config import TrainingConfig
from nested_attention.training.samples import Reader, Row, Sample
from nested_attention.training.troubles import Troubles

SMALL = {"queries": 6, "dim": 32, "depth": 1, "dim_head": 16, "resolution": 32, "augment": 0.0}
SMALL |= {"caption_dropout": 0.0, "subject_dropout": 0.0, "warmup": 0, "steps": 4, "batch": 2, "precision": "fp32"}
SMALL |= {"checkpoint_every": 2, "prefetch": 1, "gradient_checkpointing": False}


exact = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU adds gradients up in no fixed order")


class SmallVAE:
    """Latents of 4 channels and an eighth of the size: the mean color, and the brightness."""

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat((small, small.mean(1, keepdim=True)), dim=1) * 4 - 2

    def decode(self, latent):
        pixels = ((latent[:, :3] + 2) / 4).clamp(0, 1)
        return torch.nn.functional.interpolate(pixels, scale_factor=8).movedim(1, -1)


def make_base() -> Base:
    return Base(make_model(), make_clip(), SmallVAE(), make_clip_vision())


def settings(folder: Path, **changes) -> TrainingConfig:
    return TrainingConfig(**{**SMALL, "data": str(folder / "data"), "output": str(folder / "out"), **changes})


def save_picture(path: Path, seed: int, size=(48, 40)) -> None:
    pixels = torch.randint(0, 256, (size[1] // 8, size[0] // 8, 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.byte().numpy()).resize(size, Image.Resampling.BICUBIC).save(path)


def make_data(folder: Path, count: int = 3) -> Path:
    """Pictures with captions beside them."""
    (folder / "data").mkdir(parents=True)
    captions = ("a <person> in a park", "a photo of a person", "<person>", "the person reads")
    for i in range(count):
        save_picture(folder / "data" / f"{i}.png", i)
        (folder / "data" / f"{i}.txt").write_text(captions[i % len(captions)])
    return folder


def make_reader(entries, config: TrainingConfig) -> Reader:
    return Reader(entries, config, Troubles(config.on_error))


def samples_of(reader: Reader, number: int = 0) -> list[Sample]:
    return [reader(row) for row in reader.plan.rows(number)]


def bind(tokens: torch.Tensor, loaded: LoadedAdapter) -> BoundSubject:
    return BoundSubject(Subject(tokens, loaded.fingerprint, loaded.name), loaded)


def losses(config: TrainingConfig) -> dict[int, float]:
    lines = (Path(config.output) / "loss.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


__all__ = [
    "Row",
    "bind",
    "exact",
    "losses",
    "make_base",
    "make_data",
    "make_reader",
    "samples_of",
    "save_picture",
    "settings",
]
