"""The adapter: a Q-Former, and for each cross-attention layer a pair of projections to nested keys and values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .attention import NORMS, Norm
from .resampler import Resampler

FeatureLayer = Literal["last", "penultimate"]
FEATURE_LAYERS: tuple[FeatureLayer, ...] = get_args(FeatureLayer)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """All that rebuilds an adapter but its weights.

    image_dim    width of the image encoder's features
    dim, depth, heads, dim_head, ff_mult   the Q-Former
    queries      nested tokens of one photo
    output_dim   width of a nested token
    layers       inner width of each cross-attention layer, in diffusers' order: down, up, mid
    feature_layer   which hidden state of the image encoder is read
    norm, norm_factor   norm regularisation of the per-query values
    class_word   the prompt word whose text encoding is the key of the subject's token
    embeddings   learned text embeddings for the token instead: encoder name ("l", "g") to width
    """

    image_dim: int
    dim: int
    depth: int
    heads: int
    dim_head: int
    queries: int
    output_dim: int
    layers: tuple[int, ...]
    ff_mult: int = 4
    feature_layer: FeatureLayer = "last"
    norm: Norm = "rescale"
    norm_factor: float = 2.0
    class_word: str = "person"
    embeddings: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, allowed in (("norm", self.norm, NORMS), ("feature_layer", self.feature_layer, FEATURE_LAYERS)):
            if value not in allowed:
                raise ValueError(f"Adapter configuration: {name} is {value!r}, expected one of {', '.join(allowed)}.")
        if not self.layers:
            raise ValueError("Adapter configuration: it names no cross-attention layer.")
        whole = ("image_dim", "dim", "depth", "heads", "dim_head", "queries", "output_dim", "ff_mult")
        sizes = {name: getattr(self, name) for name in whole} | {f"layers[{i}]": n for i, n in enumerate(self.layers)}
        for name, value in (sizes | {f"embeddings of {name}": n for name, n in self.embeddings.items()}).items():
            if type(value) is not int or value < 1:
                raise ValueError(f"Adapter configuration: {name} is {value!r}, expected a whole number of 1 or more.")
        if type(self.norm_factor) not in (int, float) or not 0 < self.norm_factor < math.inf:
            raise ValueError(f"Adapter configuration: norm_factor is {self.norm_factor!r}, expected a number above 0.")
        if not isinstance(self.class_word, str) or not self.class_word.strip():
            raise ValueError(f"Adapter configuration: class_word is {self.class_word!r}, expected a word.")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> AdapterConfig:
        """Raises ValueError where keys are missing or unknown."""
        try:
            values = dict(json.loads(text).items())
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"The adapter's configuration is incomplete: {error}.") from error
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(
                f"The adapter's configuration has entries unknown to this version: {', '.join(sorted(unknown))}."
                " It was written by a newer version: update the pack."
            )
        try:
            return cls(**{**values, "layers": tuple(values["layers"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The adapter's configuration is incomplete: {error}.") from error


class NestedProjection(nn.Module):
    """W_Kn and W_Vn of one cross-attention layer."""

    def __init__(self, *, context: int, inner: int, operations: Any = nn):
        super().__init__()
        self.to_k = operations.Linear(context, inner, bias=False)
        self.to_v = operations.Linear(context, inner, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Nested tokens [B, M, context] to Kn and Vn, [B, M, inner] each."""
        return self.to_k(tokens), self.to_v(tokens)


class NestedAdapter(nn.Module):
    """Image features to nested tokens (`resampler`), nested tokens to each layer's Kn and Vn (`layers`).

    notes   what its file says beside the configuration: licence, base model, training record
    """

    def __init__(self, config: AdapterConfig, *, operations: Any = nn):
        super().__init__()
        self.config = config
        self.notes: dict[str, str] = {}
        self.resampler = Resampler(
            image_dim=config.image_dim,
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            dim_head=config.dim_head,
            queries=config.queries,
            output_dim=config.output_dim,
            ff_mult=config.ff_mult,
            operations=operations,
        )
        self.layers = nn.ModuleList(
            NestedProjection(context=config.output_dim, inner=inner, operations=operations) for inner in config.layers
        )
        self.embeddings = nn.ParameterDict({k: nn.Parameter(torch.zeros(w)) for k, w in config.embeddings.items()})


def fingerprint(state: Mapping[str, Tensor], samples: int = 64) -> str:
    """Short name of a set of weights, from the shapes and evenly spaced values of every tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        flat = state[name].detach().reshape(-1)
        count = min(samples, flat.numel())
        # Not by linspace: its fp32 rounds otherwise on other processors.
        picked = flat[torch.arange(count) * (flat.numel() - 1) // max(count - 1, 1)]
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        digest.update(picked.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
