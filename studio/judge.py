"""Reads attributes off pictures, to score what the small model draws. Trained and validated apart from all else."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import places
from .loop import Plan, half, train
from .scenes import Scene, World, as_pixels
from .train_vision import vocabulary

BATCH = 48
WIDTHS = (32, 64, 128, 192)


class Judge(nn.Module):
    """A small convolutional network with one head for each attribute of the person, the pet, and the place."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * WIDTHS[-1], 384), nn.ReLU(), nn.Dropout(0.2))
        self.values = {kind: vocabulary(kind) for kind in ("people", "animals")}
        self.values["scene"] = {"place": list(places.NAMES)}
        names = [(kind, key, len(options)) for kind, found in self.values.items() for key, options in found.items()]
        self.heads = nn.ModuleDict({f"{kind} {key}": nn.Linear(384, count) for kind, key, count in names})

    def forward(self, pixels: Tensor) -> dict[str, dict[str, Tensor]]:
        """Log-probabilities of each value of each attribute, from pictures [B, 3, 64, 64] in 0..1."""
        with half(torch.is_grad_enabled()):
            found = self.body(pixels * 2 - 1)
        found = found.float()
        return {
            kind: {key: self.heads[f"{kind} {key}"](found).log_softmax(-1) for key in values}
            for kind, values in self.values.items()
        }

    def targets(self, truths: list[dict[str, dict[str, str]]]) -> dict[tuple[str, str], tuple[list[int], Tensor]]:
        """For each attribute the rows that have it, and the numbers of its values there."""
        found = {}
        for kind, values in self.values.items():
            rows = [i for i, truth in enumerate(truths) if kind in truth]
            for key, options in values.items():
                found[kind, key] = rows, torch.tensor([options.index(truths[i][kind][key]) for i in rows])
        return found


def truth(world: World, scene: Scene) -> dict[str, dict[str, str]]:
    """All that is true of a scene, by kind."""
    known = {figure.kind: world.attributes(figure) for figure in scene.figures}
    return {**{k: {**identity, **view} for k, (identity, view) in known.items()}, "scene": {"place": scene.place}}


def train_judge(world: World, work: Path, steps: int) -> Judge:
    torch.manual_seed(0)
    judge = Judge()

    def loss(step: int, chance: torch.Generator) -> Tensor:
        rng = Random(f"judge {step}")
        scenes = [world.scene(rng) for _ in range(BATCH)]
        torch.manual_seed(step)
        seen = judge(soften(as_pixels([scene.picture for scene in scenes]), chance))
        targets = judge.targets([truth(world, scene) for scene in scenes])
        return torch.stack([F.nll_loss(seen[k][key][rows], t) for (k, key), (rows, t) in targets.items()]).mean()

    return train(judge, loss, Plan(steps, rate=1e-3, warmup=50, ema=0.99), work / "judge").eval()


def soften(pixels: Tensor, chance: torch.Generator) -> Tensor:
    """Half of the pictures a little blurred and noisy, as drawn ones are."""
    blurred = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
    amount = torch.rand(len(pixels), 1, 1, 1, generator=chance) * (
        torch.rand(len(pixels), 1, 1, 1, generator=chance) < 0.5
    )
    noise = torch.randn(pixels.shape, generator=chance) * 0.04
    return (pixels.lerp(blurred, amount * 0.7) + amount * noise).clamp(0, 1)
