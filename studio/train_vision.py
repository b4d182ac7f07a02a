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

from . import animals, people
from .loop import Plan, differentiable, half, initialize, train
from .pictures import VIEWS
from .scenes import Figure, World, as_pixels

BATCH = 48
COLORS = 3  # a patch is remembered as so many by so many colors


def vocabulary(kind: str) -> dict[str, list[str]]:
    """All values of each attribute of the people or the animals, as found in many of them."""
    module, rng = {"people": people, "animals": animals}[kind], Random("vocabulary")
    drawn = [{**module.draw_identity(rng), **module.draw_view(rng)} for _ in range(3000)]
    return {key: sorted({d[key] for d in drawn}) for key in drawn[0]}


class Namer(nn.Module):
    """Image encoder with heads that are thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = CLIPVisionModelProjection(VISION, torch.float32, "cpu", comfy.ops.disable_weight_init)
        self.values = {kind: vocabulary(kind) for kind in ("people", "animals")}
        names = [(kind, key, len(options)) for kind, found in self.values.items() for key, options in found.items()]
        self.heads = nn.ModuleDict(
            {f"{kind} {key}": nn.Linear(VISION["projection_dim"], count) for kind, key, count in names}
        )
        self.colors = nn.Linear(VISION["hidden_size"], 3 * COLORS**2)
        initialize(self)
        differentiable(self)
        embeddings = self.vision.vision_model.embeddings
        for weight in (embeddings.class_embedding, embeddings.position_embedding.weight):
            nn.init.normal_(weight, std=0.02)

    def losses(self, pixels: Tensor, kinds: list[str], attributes: list[dict[str, str]]) -> dict[str, Tensor]:
        """`pixels` [B, 3, H, W] in 0..1, as the host hands them to the encoder after its own preprocessing."""
        side, patch = VISION["image_size"], VISION["patch_size"]
        seen = clip_preprocess(rearrange(pixels, "b c h w -> b h w c"), size=side)
        with half():
            last, _, pooled, _ = self.vision(pixel_values=seen)
        last, pooled = last.float(), pooled.float()
        names = []
        for kind, found in self.values.items():
            rows = [i for i, k in enumerate(kinds) if k == kind]
            for key, options in found.items():
                target = torch.tensor([options.index(attributes[i][key]) for i in rows])
                names.append(F.cross_entropy(self.heads[f"{kind} {key}"](pooled[rows]), target))
        means = F.adaptive_avg_pool2d(seen, COLORS * side // patch)
        means = rearrange(means, "b c (y i) (x j) -> b (y x) (c i j)", i=COLORS, j=COLORS)
        return {"names": torch.stack(names).mean(), "colors": 0.3 * F.mse_loss(self.colors(last[:, 1:]), means)}


def train_vision(world: World, work: Path, steps: int) -> nn.Module:
    torch.manual_seed(0)
    namer = Namer()

    def losses(step: int, chance: torch.Generator) -> dict[str, Tensor]:
        rng = Random(f"vision {step}")
        kinds = ["people", "animals"] * (BATCH // 2)
        figures = [Figure(k, rng.choice(world.casts[k].trained()), rng.randrange(VIEWS), near(rng)) for k in kinds]
        pixels = as_pixels([world.draw(world.place(rng), (figure,), rng) for figure in figures])
        known = [world.attributes(figure) for figure in figures]
        return namer.losses(pixels, kinds, [{**identity, **view} for identity, view in known])

    return train(namer, losses, Plan(steps, rate=1e-3, warmup=100, ema=0.995), work / "vision")


def near(rng: Random) -> tuple[int, int, int]:
    """Where somebody stands in a photo that is encoded: large, not always in the middle."""
    side = rng.randint(104, 136)
    return (128 - side) // 2 + rng.randint(-8, 8), 128 - side + rng.randint(-4, 8), side
