"""Trains the image encoder: to name what is seen (class token) and to remember the colors of its patches (the rest)."""

from __future__ import annotations

from pathlib import Path
from random import Random

import comfy.ops
import torch
import torch.nn.functional as F
from comfy.clip_model import CLIPVisionModelProjection, clip_preprocess
from einops import rearrange
from torch import Tensor, nn

from nested_attention.host.studio import VISION

from .attributes import Heads
from .loop import Batch, Plan, differentiable, half, initialize, share, train
from .pictures import VIEWS
from .scenes import Figure, World, as_pixels

BATCH = 48
COLORS = 3  # a patch is remembered as so many by so many colors


class Namer(nn.Module):
    """Image encoder with heads that are thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = CLIPVisionModelProjection(VISION, torch.float32, "cpu", comfy.ops.disable_weight_init)
        self.heads = Heads(VISION["projection_dim"], ("people", "animals"))
        self.colors = nn.Linear(VISION["hidden_size"], 3 * COLORS**2)
        initialize(self)
        differentiable(self)
        embeddings = self.vision.vision_model.embeddings
        for weight in (embeddings.class_embedding, embeddings.position_embedding.weight):
            nn.init.normal_(weight, std=0.02)

    def losses(self, seen: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`seen` [B, 3, 96, 96] are pictures after the host's own preprocessing."""
        side, patch = VISION["image_size"], VISION["patch_size"]
        with half(seen.device):
            last, _, pooled, _ = self.vision(pixel_values=seen)
        means = F.adaptive_avg_pool2d(seen, COLORS * side // patch)
        means = rearrange(means, "b c (y i) (x j) -> b (y x) (c i j)", i=COLORS, j=COLORS)
        colors = F.mse_loss(self.colors(last[:, 1:].float()), means)
        return {"names": self.heads.loss(pooled.float(), targets), "colors": 0.3 * colors}


def train_vision(world: World, work: Path, steps: int, size: int = BATCH) -> nn.Module:
    torch.manual_seed(0)
    namer = Namer()

    def batch(number: int) -> Batch:
        rng = Random(f"vision {number}")
        kinds = ["people", "animals"] * (share(size) // 2)
        figures = [Figure(k, rng.choice(world.casts[k].trained), rng.randrange(VIEWS), near(rng)) for k in kinds]
        pixels = as_pixels([world.draw(world.place(rng), (figure,), rng) for figure in figures])
        seen = clip_preprocess(rearrange(pixels, "b c h w -> b h w c"), size=VISION["image_size"])
        known = [{figure.kind: world.known(figure)} for figure in figures]
        return {"seen": seen, "targets": namer.heads.targets(known)}

    plan = Plan(steps, size, rate=1e-3, warmup=100, ema=0.995)
    return train(namer, batch, lambda batch: namer.losses(**batch), plan, work / "vision")


def near(rng: Random) -> tuple[int, int, int]:
    """Where somebody stands in a photo that is encoded: large, not always in the middle."""
    side = rng.randint(104, 136)
    return (128 - side) // 2 + rng.randint(-8, 8), 128 - side + rng.randint(-4, 8), side
