"""Nested attention at one cross-attention layer of the host."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.ldm.modules.attention as host_attention
from torch import Tensor

from ..attention import (
    NestedToken,
    has_fused_lse,
    merge_heads,
    personalize,
    split_heads,
    text_attention,
)
from . import KEY
from .rows import Layout, Rows

if TYPE_CHECKING:
    from .run import Run

OVERRIDE = "optimized_attention_override"


def unplaceable(q: Tensor, k: Tensor, layout: Layout, options: dict[str, Any]) -> str:
    """What another node has made of the batch, where subjects cannot be placed in it, or nothing."""
    if (len(q), k.shape[1]) != (layout.rows, layout.columns):
        return f"{len(q)} rows of {k.shape[1]} text tokens where the batch has {layout.rows} of {layout.columns}"
    if layout.regions is not None and q.shape[1] != (places := math.prod(options["activations_shape"][2:4])):
        return f"{q.shape[1]} places of the picture where it has {places}, so that regions cannot be told"
    return ""


@dataclass(eq=False)
class LayerPatch:
    """Replaces a layer's attention for the length of one run: what was there before, plus what the subjects change.

    index      the layer's number in the adapter
    previous   another pack's patch of this layer, or None for the host's own attention
    added      further packs' contributions, in the convention of IPAdapter's patch objects
    """

    run: Run
    index: int
    previous: Callable[..., Tensor] | None = None
    added: list[tuple[Callable[..., Tensor], dict[str, Any]]] = field(default_factory=list)

    def add(self, callback: Callable[..., Tensor], **kwargs: Any) -> None:
        self.added.append((callback, kwargs))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any]) -> Tensor:
        # Without our key a patch of ours further in, under another pack's, does nothing.
        options = {name: value for name, value in extra_options.items() if name != KEY}
        layout: Layout | None = extra_options.get(KEY)
        if layout is None:
            out = self.attend(q, k, v, options)
        elif misfit := unplaceable(q, k, layout, options):
            self.run.stand_aside(misfit)
            out = self.attend(q, k, v, options)
        else:
            self.run.reached.add(self.index)
            out = self.attend_personalized(q, k, v, options, layout)
        for callback, kwargs in self.added:
            out = out + callback(out, q, k, v, options, **kwargs)
        return out

    def attend(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        if self.previous is not None:
            return self.previous(q, k, v, options)
        return host_attention.optimized_attention(
            q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"), transformer_options=options
        )

    def attend_personalized(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], layout: Layout) -> Tensor:
        heads = options["n_heads"]
        qh, kh, vh = (split_heads(x, heads) for x in (q, k, v))
        if self.is_plain(qh, options):
            text, lse = text_attention(qh, kh, vh)
            out = text
        else:
            text, lse = None, None
            out = split_heads(self.attend(q, k, v, options), heads)
            if layout.groups and (self.previous is not None or OVERRIDE in options):
                out = out.clone()  # the output of others may be a tensor that they keep
        for rows in layout.groups:
            span = slice(rows.start, rows.stop)
            part = [x[span] for x in (qh, kh, vh)]
            tokens = self.tokens(part[0], rows, layout, options)
            observe = None if layout.watch is None else layout.watch.layer(self.index, rows, part, tokens, options)
            known = (None, None) if text is None else (text[span], lse[span])
            personalize(out[span], *part, tokens, *known, observe)
        return merge_heads(out)

    def is_plain(self, q: Tensor, options: dict[str, Any]) -> bool:
        """Whether the host would run the very kernel here that also gives us the softmax's denominator."""
        host_kernel = host_attention.optimized_attention is host_attention.attention_pytorch
        return self.previous is None and host_kernel and OVERRIDE not in options and has_fused_lse(q)

    def tokens(self, q: Tensor, rows: Rows, layout: Layout, options: dict[str, Any]) -> list[NestedToken]:
        height, width = options["activations_shape"][2:4] if layout.regions is not None else (0, 0)
        tokens = []
        for use in rows.uses:
            subject = self.run.subjects[use.subject]
            keys, values = self.run.nested(use.subject, self.index, q)
            tokens.append(
                NestedToken(
                    columns=use.columns,
                    keys=keys,
                    values=values,
                    strength=subject.strength * use.weight,
                    weight=subject.token_weight,
                    norm=subject.adapter.config.norm,
                    norm_factor=subject.adapter.config.norm_factor,
                    region=layout.region(use.subject, rows, height, width),
                    subject=use.subject,
                    competition=subject.competition,
                )
            )
        return tokens
