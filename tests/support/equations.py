"""What sampling with subjects should give: ComfyUI's own UNet, its cross-attention written out from the equations.

Knows nothing of how the pack finds rows: the test says, for each text, where its subjects stand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from reference import nested_attention
from torch import Tensor

from nested_attention.attention import NestedToken, merge_heads, split_heads
from nested_attention.host.adapters import BoundSubject


@dataclass(frozen=True)
class Stands:
    """A subject at columns of a text."""

    bound: BoundSubject
    columns: tuple[int, ...]
    strength: float = 1.0
    weight: float = 1.0
    region: Tensor | None = None  # [h, w] in latent pixels
    competition: float = 0.0

    def token(self, layer: int, heads: int, size: tuple[int, int]) -> NestedToken:
        config = self.bound.adapter.config
        keys, values = self.bound.adapter.patcher.model.layers[layer](self.bound.subject.tokens)
        keys, values = split_heads(keys.float(), heads), split_heads(values.float(), heads)
        settings = self.strength, self.weight, config.norm, config.norm_factor
        region = self.region
        if region is not None:
            region = F.interpolate(region[None, None], size, mode="bilinear").flatten(1)
        return NestedToken(self.columns, keys, values, *settings, region, id(self.bound), self.competition)


def subjects_in(row: Tensor, texts: list[tuple[Tensor, list[Stands]]]) -> list[Stands]:
    """Subjects of a batch's row [T', C], which is one of the texts, perhaps several times over."""
    for text, stands in texts:
        times = len(row) // len(text)
        if len(row) == times * len(text) and torch.allclose(row.to(text), text.repeat(times, 1), atol=1e-5):
            shifts = range(0, len(row), len(text))
            return [replace(s, columns=tuple(c + shift for shift in shifts for c in s.columns)) for s in stands]
    return []


def expected_model(model, sites, texts: list[tuple[Tensor, list[Stands]]]):
    """A clone of the model that computes the equations, one query at a time, on the CPU."""
    result = model.clone()
    context = {}

    def remember(executor, *args, **kwargs):
        context["now"] = args[3]
        return executor(*args, **kwargs)

    def layer_attention(layer):
        def attend(q, k, v, extra_options):
            heads = extra_options["n_heads"]
            size = tuple(extra_options["activations_shape"][2:])
            rows = [[s.token(layer, heads, size) for s in subjects_in(row, texts)] for row in context["now"]]
            return merge_heads(nested_attention(*(split_heads(x.cpu(), heads) for x in (q, k, v)), rows)).to(q)

        return attend

    for layer, site in enumerate(sites):
        result.set_model_attn2_replace(layer_attention(layer), *site.key)
    result.add_wrapper_with_key("apply_model", "equations", remember)
    return result
