"""Teaches the UNet to look at the noun of somebody in the places where they are, as large models do of themselves.

Left alone, this small one gives its nouns a hundredth of the attention, at places that change from picture to picture:
what a subject puts in a noun's place could show there only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from nested_attention.attention import merge_heads, split_heads
from nested_attention.host.layers import Site, cross_attention_sites

from .scenes import MOST, SIDE, Scene, World
from .words import Words, noun_columns

SHARE = 0.3  # of the attention, that a noun is to have where its figure is
GRID = 16  # side of the largest layer with attention to the text


def shapes(world: World, scene: Scene) -> Tensor:
    """How much of each place shows each figure, [figures, GRID, GRID]; who comes later stands in front."""
    found: list[np.ndarray] = []
    for figure in scene.figures:
        left, top, side = figure.box
        canvas = Image.new("L", (SIDE, SIDE))
        canvas.paste(world.cutout(figure).getchannel("A").resize((side, side)), (left, top))
        shown = np.asarray(canvas.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float32) / 255
        found = [*(before * (1 - shown) for before in found), shown]
    return torch.from_numpy(np.stack(found))


def looked_at(world: World, words: Words, scenes: Sequence[Scene], captions: Sequence[str]) -> dict[str, Tensor]:
    """`wanted` and `nouns` of Looking, of MOST figures for each scene. A caption that was dropped has no nouns."""
    wanted = torch.full((len(scenes), MOST, GRID, GRID), -1.0)
    nouns = torch.zeros(len(scenes), MOST, 2, dtype=torch.long)
    for i, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
        columns = noun_columns(caption, scene.figures, world, words) if caption else []
        if columns:
            wanted[i, : len(columns)] = shapes(world, scene) * SHARE
            nouns[i, : len(columns)] = torch.tensor([(i, column) for column in columns])
    return {"wanted": wanted.flatten(0, 1), "nouns": nouns.flatten(0, 1)}


@dataclass
class Looking:
    """What the cross-attention layers of a batch look at, against what they should: collects `errors`.

    wanted   the attention that each noun should have, [nouns, GRID, GRID]; -1 where there is none
    nouns    the picture of the batch, and the token, [nouns, 2]
    """

    wanted: Tensor
    nouns: Tensor
    errors: list[Tensor] = field(default_factory=list)

    def options(self, unet: nn.Module) -> dict[str, Any]:
        """The host's options for a forward of the UNet that is watched."""
        patches = {site.key: self.layer(site) for site in cross_attention_sites(unet)}
        return {"patches_replace": {"attn2": patches}}

    def layer(self, site: Site) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
            q, k, v = (split_heads(x, site.heads) for x in (q, k, v))
            p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).float().softmax(-1)
            side = round(q.shape[2] ** 0.5)
            wanted = rearrange(F.adaptive_avg_pool2d(self.wanted, side), "s h w -> s 1 (h w)")
            seen = p[self.nouns[:, 0], :, :, self.nouns[:, 1]].clamp(1e-6, 1 - 1e-6)
            error = -(wanted * seen.log() + (1 - wanted) * (1 - seen).log()).mean((1, 2))
            there = (self.wanted[:, 0, 0] >= 0).float()
            self.errors.append((error * there).sum() / there.sum())
            return merge_heads(p.to(v.dtype) @ v)

        return attend

    @property
    def error(self) -> Tensor:
        """Cross-entropy of the attention to the nouns, averaged over layers."""
        return torch.stack(self.errors).mean()
