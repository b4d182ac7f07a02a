"""Where the adapters of the small model start: nested tokens that say of a photo what the words of a caption would.

The Q-Former learns to give, for a photo, the text states of a description of the same one, each at a token of its own.
That needs no UNet and costs next to nothing. As W_Kn and W_Vn start from the layer's own to_k and to_v, the subject's
word then looks its value up among those words; training through the UNet adds what words do not tell.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nested_attention.adapter import AdapterConfig, NestedAdapter
from nested_attention.host.base import Base, fresh_adapter
from nested_attention.host.images import features, fit
from nested_attention.training.config import TrainingConfig

from .loop import Batch, Plan, share, train
from .pictures import VIEWS
from .scenes import World, as_pixels

BATCH = 32
WIDTH = 4  # tokens for each attribute


def warm_start(world: World, base: Base, kind: str, config: TrainingConfig, folder: Path, steps: int) -> NestedAdapter:
    """A fresh adapter whose Q-Former has learned so."""
    with base.frozen():
        adapter = fresh_adapter(config, base)
        states = described(world, base, kind, config.class_word, config.queries)

        @cache
        def known(device: torch.device) -> tuple[Tensor, Tensor]:
            seen, who = photographed(world, base, kind, adapter.config, config.fit)
            return seen.to(device), states[who].to(device)

        def batch(number: int) -> Batch:
            chance = torch.Generator().manual_seed(number)
            return {"rows": torch.randint(len(world.casts[kind].trained) * VIEWS, (share(BATCH),), generator=chance)}

        def losses(batch: Batch) -> dict[str, Tensor]:
            rows = batch["rows"]
            seen, wanted = known(rows.device)
            return {"loss": F.mse_loss(adapter.resampler(seen[rows]), wanted[rows])}

        plan = Plan(steps, BATCH, rate=2e-3, warmup=50, ema=0.99)
        adapter.resampler = train(adapter.resampler, batch, losses, plan, folder)
    return adapter


@torch.no_grad()
def photographed(world: World, base: Base, kind: str, config: AdapterConfig, how: str) -> tuple[Tensor, Tensor]:
    """All who are trained on, in each view and in front of some wall: image features [photos, N, C], and which of
    them it is.
    """
    rng, found = Random(f"warm start {kind}"), []
    portraits = [(number, view) for number in world.casts[kind].trained for view in range(VIEWS)]
    for first in range(0, len(portraits), BATCH):
        photos = [world.portrait(kind, *portrait, rng) for portrait in portraits[first : first + BATCH]]
        pictures = rearrange(as_pixels(photos), "b c h w -> b h w c")
        found.append(features(base.clip_vision, fit(pictures, base.clip_vision.image_size, how), config))
    return torch.cat(found), torch.arange(len(portraits)) // VIEWS


@torch.no_grad()
def described(world: World, base: Base, kind: str, noun: str, queries: int) -> Tensor:
    """Text states [identities, queries, C] that the nested tokens of each identity start as.

    WIDTH of them are each attribute's words, or fewer where there are fewer queries, all others the noun; a single one
    is the mean of those.
    """
    cast, rows = world.casts[kind], []
    for number in cast.trained:
        identity = cast.identities[number]
        told = [key for key in cast.module.TOLD if identity[key] not in ("", "plain")]
        phrases = cast.module.describe(identity, Random(0), 1.0)
        phrases += [identity["kind"]] if kind == "animals" else []
        states = base.clip.encode_from_tokens(base.clip.tokenize(f"a {' '.join(phrases)} {noun}"))[0].float()
        column, places = 2, {}  # after START and 'a'
        for key, phrase in zip(told, phrases, strict=True):
            length = len(base.clip.tokenizer.clip_l.tokenizer.tokenize(phrase))
            places[key] = [column + min(i, length - 1) for i in range(WIDTH)]
            column += length
        columns = [c for key in cast.module.TOLD for c in places.get(key, [column] * WIDTH)]
        if queries == 1:
            rows.append(states[columns].mean(0, keepdim=True))
        else:
            told_in = columns[:: max(1, -(-len(columns) // queries))]
            rows.append(states[(told_in + [column] * queries)[:queries]])
    return torch.stack(rows)
