"""Trains UNet and text encoder together on scenes and their captions: rectified flow.

The UNet starts from scratch, and learns to look at nouns where they stand along with what pictures look like.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from einops import rearrange
from torch import Tensor, nn

from nested_attention.host.studio import PATCH, UNET, PixelLatents, StudioLatents

from .looking import Looking, looked_at
from .loop import Batch, Plan, half, initialize, share, train
from .pictures import SIDE
from .scenes import SMALL, STANDS, Scene, World, as_pixels, stacked
from .train_text import TOLD, TextEncoder, tellings
from .words import Words

BATCH = 64
RATE, TEXT_RATE = 2e-3, 0.4  # the UNet's; how much of it is the text encoder's
CAPTION_DROPOUT = 0.1
SCENES = [("people",), *STANDS]
NOISE = 0.5, 1.2  # mean and spread of the logits of a step's noises: high ones decide on hair, low ones draw it
FACE = (0.33, 0.67), (0.30, 0.66)  # where it is in the square that somebody is drawn in, across and down
FACES = 5.0  # weight of the error there: a mouth is but a few pixels
LOOKING = 0.05  # weight of the error of where nouns are looked at
TELLING = 0.02  # weight of the error of what words tell, lest those are forgotten that the UNet cannot use yet


class Painter(nn.Module):
    """Text encoder and a fresh UNet."""

    def __init__(self, text: TextEncoder):
        super().__init__()
        self.text = text
        self.unet = UNetModel(**UNET, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
        initialize(self.unet)
        nn.init.zeros_(self.unet.out[-1].weight)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Of the velocity, of where nouns are looked at, and of what words tell."""
        clean, (mean, spread) = clean_latents(as_pixels(batch["pictures"])), NOISE
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(len(clean), device=clean.device) * spread + mean)
        noisy = clean.lerp(noise, rearrange(sigma, "b -> b 1 1 1"))
        watched = Looking(batch["wanted"], batch["nouns"])
        with half(noisy.device):
            states = self.text(batch["tokens"], batch["text"])
            velocity = self.unet(noisy, sigma * 1000, context=states, transformer_options=watched.options(self.unet))
        error = ((velocity.float() - (noise - clean)).square() * batch["face_weights"]).mean()
        telling = self.text.telling(states, batch["told"])
        return {"loss": error, "looking": LOOKING * watched.error, "telling": TELLING * telling}


def face_weights(scene: Scene) -> Tensor:
    """Of the error at each place, [1, 32, 32]: FACES times as large at faces, one on average."""
    found = torch.ones(1, SMALL // PATCH, SMALL // PATCH)
    for figure in scene.figures:
        left, top, side = (length * found.shape[-1] / SIDE for length in figure.box)
        across, down = (
            slice(*(max(0, round(at + side * part)) for part in parts))
            for at, parts in zip((left, top), FACE, strict=True)
        )
        found[:, down, across] = FACES
    return found / found.mean()


def clean_latents(pixels: Tensor) -> Tensor:
    """Pictures [B, 3, 64, 64] in 0..1 as the host's model takes them, [B, 12, 32, 32]."""
    return StudioLatents().process_in(PixelLatents().encode(pixels * 2 - 1))


def train_base(world: World, words: Words, text: TextEncoder, work: Path, steps: int, size: int = BATCH) -> Painter:
    torch.manual_seed(0)
    painter = Painter(text.requires_grad_(True))

    def batch(number: int) -> Batch:
        rng = Random(f"base {number}")
        scenes = [world.scene(rng, told=rng.choice(TOLD), kinds=rng.choice(SCENES)) for _ in range(share(size))]
        captions = ["" if rng.random() < CAPTION_DROPOUT else scene.caption for scene in scenes]
        tokens, text = words.batch([words(caption, rng) for caption in captions])
        texts = [(caption, scene.place, scene.figures) for caption, scene in zip(captions, scenes, strict=True)]
        return {
            "pictures": stacked([scene.picture for scene in scenes]),
            "face_weights": torch.stack([face_weights(scene) for scene in scenes]),
            "tokens": tokens,
            "text": text,
            "told": tellings(painter.text.heads, world, words, texts),
            **looked_at(world, words, scenes, captions),
        }

    plan = Plan(steps, size, rate=RATE, slower={"text": TEXT_RATE}, warmup=200)
    return train(painter, batch, painter.losses, plan, work / "base")
