"""Trains the text encoder and the UNet together, from scratch, on scenes and their captions: rectified flow.

First what pictures look like, then what words mean: a text encoder that learns beside a UNet that cannot draw yet
forgets its words, as all prompts do the same for it. So it begins anew, more slowly, once there are shapes to tell of.
Then captions tell nearly all of somebody, so that each word comes to mean what it names. Then the UNet alone learns to
draw more finely, two people in one picture also, and to look at nouns where they stand. Last, the same from more noise:
there the words alone decide what hair somebody gets, and few of the steps before were there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random

import comfy.ops
import numpy as np
import torch
import torch.nn.functional as F
from comfy.clip_model import CLIPTextModel
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from nested_attention.host.studio import TEXT, UNET, PixelLatents, StudioLatents

from .looking import Looking
from .loop import Loss, Plan, differentiable, half, initialize, train
from .scenes import STANDS, World, as_pixels
from .words import LENGTH, Words

SHAPES = 600  # steps of the first part
PARTS = ("base", "told", "fine", "late")  # that follow it
CAPTION_DROPOUT = 0.1
SCENES = [("people",), *STANDS]  # of the last two parts


def clean_latents(pictures: list[np.ndarray]) -> Tensor:
    """Pictures as the host's model takes them, [B, 12, 32, 32]."""
    return StudioLatents().process_in(PixelLatents().encode(as_pixels(pictures) * 2 - 1))


class Painter(nn.Module):
    """Text encoder, with the embedding of the known words alone, and UNet."""

    def __init__(self, words: int):
        super().__init__()
        plain = comfy.ops.disable_weight_init
        self.text = CLIPTextModel(TEXT, torch.float32, "cpu", plain)
        self.text.set_input_embeddings(plain.Embedding(words + 1, TEXT["hidden_size"]))
        self.unet = UNetModel(**UNET, dtype=torch.float32, operations=plain)
        initialize(self.unet)
        nn.init.zeros_(self.unet.out[-1].weight)
        self.forget_words(0.05)
        differentiable(self)

    def forget_words(self, spread: float) -> None:
        """A fresh text encoder; `spread` of its words' vectors."""
        initialize(self.text)
        embeddings = self.text.text_model.embeddings
        nn.init.normal_(embeddings.token_embedding.weight, std=spread)
        nn.init.normal_(embeddings.position_embedding.weight, std=0.05)

    def encode(self, rows: Tensor, text: Tensor) -> Tensor:
        """States of texts, [B, 77, C]. Past a text's end they are zero and need not be computed: each sees its past."""
        length = int(text.sum(1).max())
        model = self.text.text_model
        states = model.embeddings.token_embedding(rows[:, :length], out_dtype=torch.float32)
        states = states + model.embeddings.position_embedding.weight[:length]
        causal = torch.full((length, length), float("-inf")).triu(1)
        states = model.final_layer_norm(model.encoder(states, mask=causal)[0]) * text[:, :length]
        return F.pad(states, (0, 0, 0, LENGTH - length))


def train_base(world: World, words: Words, work: Path, steps: Mapping[str, int]) -> Painter:
    """`steps` of each of the PARTS; before them come the first, of SHAPES."""
    torch.manual_seed(0)
    painter = Painter(len(words.ids))
    first = Plan(min(SHAPES, steps["base"]), horizon=1500, rate=2e-3)
    painter = train(painter, flow_loss(painter, world, words, "base", 32, 0.2), first, work / "shapes")
    torch.manual_seed(1)
    painter.requires_grad_(True).forget_words(1.0)
    second = Plan(steps["base"], rate=1e-3, warmup=200, slower={"text": 0.4}, seed=1)
    painter = train(painter, flow_loss(painter, world, words, "words", 16, 0.5), second, work / "base")
    painter.requires_grad_(True)
    third = Plan(steps["told"], rate=7e-4, warmup=100, seed=2)
    painter = train(painter, flow_loss(painter, world, words, "told", 16, 0.5, 0.9), third, work / "told")
    for seed, (name, lateness) in enumerate({"fine": 0.2, "late": 0.7}.items(), 3):
        painter.unet.requires_grad_(True)
        plan = Plan(steps[name], rate=1e-3, warmup=100, seed=seed)
        loss = flow_loss(painter, world, words, name, 16, lateness, 0.8, looking=0.05)
        painter = train(painter, loss, plan, work / name)
    return painter


def flow_loss(
    painter: Painter,
    world: World,
    words: Words,
    name: str,
    batch: int,
    lateness: float,
    told: float = 0.3,
    looking: float = 0.0,
) -> Loss:
    """Loss of a step: the error of the velocity at noises around sigmoid(lateness).

    told      how often a caption tells each attribute of somebody
    looking   weight of the error of where nouns are looked at; with it, there are pictures of two people also
    """

    def loss(step: int, chance: torch.Generator) -> dict[str, Tensor]:
        rng = Random(f"{name} {step}")
        kinds = [rng.choice(SCENES) if looking else None for _ in range(batch)]
        scenes = [world.scene(rng, told=told, kinds=kinds[i]) for i in range(batch)]
        captions = ["" if rng.random() < CAPTION_DROPOUT else scene.caption for scene in scenes]
        clean = clean_latents([scene.picture for scene in scenes])
        sigma = torch.sigmoid(torch.randn(batch, generator=chance) + lateness)
        noise = torch.randn(clean.shape, generator=chance)
        noisy = clean.lerp(noise, sigma.view(-1, 1, 1, 1))
        watched = Looking.at(world, words, scenes, captions) if looking else None
        options = watched.options(painter.unet) if watched else {}
        with half():
            states = painter.encode(*words.batch([words(caption, rng) for caption in captions]))
            velocity = painter.unet(noisy, sigma * 1000, context=states, transformer_options=options)
        losses = {"loss": (velocity.float() - (noise - clean)).square().mean()}
        return losses | ({"looking": looking * watched.error} if watched else {})

    return loss
