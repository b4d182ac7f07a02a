"""The four views of the paper on a run, as numbers (its figures on p_s, v*, the nested attention and the Q-Former).

H heads, N image positions of a layer (h * w, row by row), C = H * D its inner width, M nested tokens, S subjects,
P points.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isqrt, prod
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import NestedToken, at_least_fp32, merge_heads, norm_scale, per_query_values
from ..resampler import Resampler

Point = tuple[float, float]
MOST_POINTS = 32


@dataclass(frozen=True)
class Lookup:
    """All that nested attention saw of one subject in one layer, for one picture.

    q        queries [1, H, N, D]
    textual  the textual value V_s that is replaced, [1, H, 1, D]
    token    nested keys and values, and their norm regularisation
    """

    label: str
    size: tuple[int, int]
    q: Tensor
    textual: Tensor
    token: NestedToken


def average(maps: Sequence[Tensor]) -> Tensor:
    """Mean of maps [h, w] of different sizes, at the size of the largest."""
    size = largest(maps)
    return torch.stack([resize(m, size) for m in maps]).mean(0)


def largest(maps: Sequence[Tensor]) -> tuple[int, int]:
    return max((tuple(m.shape) for m in maps), key=prod)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[h, w] to another size, bilinear."""
    return F.interpolate(x[None, None].float(), size, mode="bilinear")[0, 0]


def shares(maps: Sequence[Tensor]) -> Tensor:
    """Who owns which place: each subject's part of the subjects' attention there, [S, h, w] of S maps [h, w]."""
    size = largest(maps)
    together = torch.stack([resize(m, size) for m in maps])
    return together / together.sum(0).clamp_min(torch.finfo(together.dtype).tiny)


def nested_values(lookup: Lookup) -> Tensor:
    """v* with its norm regularisation, as it enters the layer's output at strength 1, [N, C]."""
    star = at_least_fp32(per_query_values(lookup.q, lookup.token))
    scaled = star if lookup.token.norm == "off" else star * norm_scale(star, lookup.textual, lookup.token)
    return merge_heads(scaled)[0]


def nested_attention(lookup: Lookup, positions: Sequence[int]) -> Tensor:
    """softmax(q Kn^T / sqrt(d)) at some positions, the mean over heads, [P, M] (eq. 1)."""
    q = at_least_fp32(lookup.q[0, :, list(positions)])
    keys = at_least_fp32(lookup.token.keys[0])
    return (q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(0)


def point_weights(lookups: Iterable[Lookup], points: Sequence[Point]) -> Tensor:
    """Nested attention of points of the picture, the mean over layers, [P, M]."""
    return torch.stack([nested_attention(x, positions(points, x.size)) for x in lookups]).mean(0)


def principal_colors(values: Tensor, constant: Tensor, spread: float = 0.02) -> tuple[Tensor, Tensor, float]:
    """Values [N, C] as colours: their first three principal components become red, green and blue in 0..1.

    Returns the colours [N, 3], the colour of a constant value [C] along the same axes [3], and the part of the values'
    variance that the three components hold. `spread` of the values at either end is cut off the scale.
    """
    mean = values.mean(0)
    axes, kept = principal_axes(values - mean)
    places, place = (values - mean) @ axes, (constant - mean) @ axes
    low, high = places.quantile(spread, dim=0), places.quantile(1 - spread, dim=0)
    scale = (high - low).clamp_min(1e-12)
    return ((places - low) / scale).clamp(0, 1), ((place - low) / scale).clamp(0, 1), kept


def principal_axes(centred: Tensor, count: int = 3) -> tuple[Tensor, float]:
    """Axes [C, count] of centred rows [N, C], largest component positive, and their part of the variance."""
    n, c = centred.shape
    if n < c:  # the smaller of the two Gram matrices has the same eigenvalues
        energy, vectors = torch.linalg.eigh(centred @ centred.T)
        axes = F.normalize(centred.T @ vectors[:, -count:].flip(-1), dim=0)
    else:
        energy, vectors = torch.linalg.eigh(centred.T @ centred)
        axes = vectors[:, -count:].flip(-1)
    axes = F.pad(axes, (0, count - axes.shape[1]))
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return axes, float(energy[-count:].sum() / energy.sum().clamp_min(1e-30))


def image_attention(resampler: Resampler, features: Tensor) -> tuple[Tensor, Tensor]:
    """Nested tokens [B, Q, C] of image features [B, I, width], and what each looked at in the photo, [B, Q, I].

    The attention is the mean over the Q-Former's layers and heads; what is missing to 1 went to the other queries.
    """
    seen: list[Tensor] = []
    tokens = resampler(features, observe=lambda attention: seen.append(attention.mean(1)))
    return tokens, torch.stack(seen).mean(0)


def patch_maps(attention: Tensor) -> Tensor:
    """Attention [..., I] over an image encoder's tokens as maps [..., g, g] over its patches, the class token left out.

    Raises ValueError where the patches form no square.
    """
    count = attention.shape[-1]
    side = isqrt(count)
    extra = count - side * side
    if extra > 1:
        raise ValueError(f"The image encoder gives {count} features, which are no square of patches.")
    return attention[..., extra:].unflatten(-1, (side, side))


def top_tokens(weights: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """The largest weights [P, count] of [P, M], and whose they are."""
    return weights.topk(min(count, weights.shape[-1]), dim=-1)


def parse_points(text: str) -> list[Point]:
    """Points "x, y; x, y" in 0..1 from the picture's top left. Raises ValueError where it says something else."""
    points = []
    for part in filter(str.strip, normalize("NFKC", text).split(";")):  # so that Chinese commas will do
        try:
            x, y = (float(number) for number in part.split(","))
        except ValueError:
            x = y = -1.0
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ValueError(
                f"'{part.strip()}' is no point. Write x,y between 0 and 1, and ; between points: 0.4,0.3; 0.5,0.6"
            )
        points.append((x, y))
    if len(points) > MOST_POINTS:
        raise ValueError(f"These are {len(points)} points; {MOST_POINTS} at most can be shown.")
    return points


def positions(points: Sequence[Point], size: tuple[int, int]) -> list[int]:
    """Points as positions in a layer of h by w."""
    h, w = size
    return [min(int(y * h), h - 1) * w + min(int(x * w), w - 1) for x, y in points]
