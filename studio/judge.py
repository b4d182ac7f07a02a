"""Reads attributes off pictures, to score what the small model draws. Trained and validated apart from all else."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attributes import Heads, truth
from .loop import Batch, Plan, half, share, train
from .scenes import World, as_pixels, stacked

BATCH = 96
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
        self.heads = Heads(384)

    def features(self, pixels: Tensor) -> Tensor:
        with half(pixels.device, torch.is_grad_enabled()):
            found = self.body(pixels * 2 - 1)
        return found.float()

    def forward(self, pixels: Tensor) -> dict[str, dict[str, Tensor]]:
        """Log-probabilities of each value of each attribute, from pictures [B, 3, 64, 64] in 0..1."""
        found: dict[str, dict[str, Tensor]] = {}
        for (kind, key), seen in zip(self.heads.names, self.heads.named(self.features(pixels)), strict=True):
            found.setdefault(kind, {})[key] = seen.log_softmax(-1)
        return found


def train_judge(world: World, work: Path, steps: int, size: int = BATCH) -> Judge:
    torch.manual_seed(0)
    judge = Judge()

    def batch(number: int) -> Batch:
        rng = Random(f"judge {number}")
        scenes = [world.scene(rng) for _ in range(share(size))]
        return {
            "pixels": stacked([scene.picture for scene in scenes]),
            "targets": judge.heads.targets([truth(world, scene) for scene in scenes]),
        }

    def losses(batch: Batch) -> dict[str, Tensor]:
        return {"loss": judge.heads.loss(judge.features(soften(as_pixels(batch["pixels"]))), batch["targets"])}

    return train(judge, batch, losses, Plan(steps, size, rate=1e-3, warmup=50, ema=0.99), work / "judge").eval()


def soften(pixels: Tensor) -> Tensor:
    """Half of the pictures a little blurred and noisy, as drawn ones are."""
    blurred = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2.0, mode="bilinear")
    chance, amount = torch.rand(2, len(pixels), 1, 1, 1, device=pixels.device)
    amount = amount * (chance < 0.5)
    return (pixels.lerp(blurred, amount * 0.7) + amount * torch.randn_like(pixels) * 0.04).clamp(0, 1)
