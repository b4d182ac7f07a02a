"""The Q-Former: learned queries read the image features and become the subject's nested tokens (paper, section 4).

A Perceiver resampler of the IP-Adapter lineage, in the parameter names of that lineage.
B photos, I image features, Q queries (nested tokens), H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import merge_heads, split_heads


class PerceiverAttention(nn.Module):
    """Attention of the queries over image features and queries together, both normalised before."""

    def __init__(self, *, dim: int, heads: int, dim_head: int, operations: Any = nn):
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.norm1 = operations.LayerNorm(dim)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, inner, bias=False)
        self.to_kv = operations.Linear(dim, inner * 2, bias=False)
        self.to_out = operations.Linear(inner, dim, bias=False)

    def project(self, image: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, Q, D], keys and values [B, H, I + Q, D]."""
        latents = self.norm2(latents)
        k, v = self.to_kv(torch.cat((self.norm1(image), latents), dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (self.to_q(latents), k, v))
        return q, k, v

    def forward(self, image: Tensor, latents: Tensor) -> Tensor:
        return self.to_out(merge_heads(F.scaled_dot_product_attention(*self.project(image, latents))))

    def image_attention(self, image: Tensor, latents: Tensor) -> Tensor:
        """Probability of each image feature for each query, [B, H, Q, I]."""
        q, k, _ = self.project(image, latents)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)[..., : image.shape[1]]


def feed_forward(dim: int, mult: int, operations: Any) -> nn.Sequential:
    return nn.Sequential(
        operations.LayerNorm(dim),
        operations.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        operations.Linear(dim * mult, dim, bias=False),
    )


class Resampler(nn.Module):
    """Image features [B, I, image_dim] to nested tokens [B, Q, output_dim].

    `operations` supplies Linear and LayerNorm: torch.nn, or a host's classes that load and cast weights its own way.
    """

    def __init__(
        self,
        *,
        image_dim: int,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        queries: int,
        output_dim: int,
        ff_mult: int,
        operations: Any = nn,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, queries, dim) * dim**-0.5)
        self.proj_in = operations.Linear(image_dim, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim=dim, heads=heads, dim_head=dim_head, operations=operations),
                    feed_forward(dim, ff_mult, operations),
                ]
            )
            for _ in range(depth)
        )
        self.proj_out = operations.Linear(dim, output_dim)
        self.norm_out = operations.LayerNorm(output_dim)

    def forward(self, image: Tensor, observe: Callable[[Tensor], None] | None = None) -> Tensor:
        """`observe`, if given, is called in each layer with the queries' attention over the image, [B, H, Q, I]."""
        latents = self.latents.to(image).expand(len(image), -1, -1)
        image = self.proj_in(image)
        for attention, mlp in self.layers:
            if observe is not None:
                observe(attention.image_attention(image, latents))
            latents = attention(image, latents) + latents
            latents = mlp(latents) + latents
        return self.norm_out(self.proj_out(latents))
