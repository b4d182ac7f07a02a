"""Other ways to put the same Q-Former tokens into the model, trained and drawn with in the same way, to compare with.

IP-Adapter's decoupled cross-attention (Ye et al. 2023): attention over the tokens by keys and values of their own is
added to the text's everywhere in the picture. The single-token way is nested attention with one token: its softmax has
one entry, so that the value is the same at every place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nested_attention.adapter import NestedAdapter
from nested_attention.attention import merge_heads, split_heads
from nested_attention.host.layers import Site, cross_attention_sites
from nested_attention.host.objective import Batch, DiffusionObjective
from nested_attention.training.trainer import Pairs


@dataclass(frozen=True)
class DecoupledPatch:
    """attention(q, k, v) + scale * attention(q, K, V).

    keys, values   [rows, M, inner], one for each row of a batch; with `by_chunk`, two: with the subject, with nobody
    """

    site: Site
    keys: Tensor
    values: Tensor
    scale: float = 1.0
    by_chunk: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        keys, values = self.keys, self.values
        if self.by_chunk:  # rows are 0: with the subject, for the prompt; 1: with nobody, for the negative prompt
            each = len(q) // len(options["cond_or_uncond"])
            rows = [number for number in options["cond_or_uncond"] for _ in range(each)]
            keys, values = keys[rows], values[rows]
        qh, kh, vh, own_k, own_v = (split_heads(x, self.site.heads) for x in (q, k, v, keys, values))
        text = F.scaled_dot_product_attention(qh, kh, vh)
        return merge_heads(text + self.scale * F.scaled_dot_product_attention(qh, own_k, own_v))


class DecoupledObjective(DiffusionObjective):
    """The loss of IP-Adapter's way: the placeholder stays its class word."""

    def denoise(self, batch: Batch, pairs: Pairs) -> Tensor:
        patches = {s.key: DecoupledPatch(s, *pair) for s, pair in zip(self.sites, pairs, strict=True)}
        options = {**self.base.model.model_options["transformer_options"], "patches_replace": {"attn2": patches}}
        return self.base.model.model.apply_model(batch.noisy, batch.sigma, transformer_options=options, **batch.conds)


@torch.no_grad()
def apply_decoupled(model: Any, adapter: NestedAdapter, features: Tensor, scale: float) -> Any:
    """A clone of the model with the subject of these image features [1, I, image_dim] in every layer."""
    tokens = adapter.resampler(torch.cat((features, torch.zeros_like(features))))
    model = model.clone()
    for site, layer in zip(cross_attention_sites(model.model.diffusion_model), adapter.layers, strict=True):
        model.set_model_attn2_replace(DecoupledPatch(site, *layer(tokens), scale, by_chunk=True), *site.key)
    return model
