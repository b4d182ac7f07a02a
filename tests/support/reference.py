"""Nested attention written from the paper's equations, one query at a time: slow, and plainly right."""

from __future__ import annotations

import torch


def nested_attention(q, k, v, rows):
    """Output of one layer.

    q [B, H, N, D], k and v [B, H, T, D]; rows: for each of the B rows the list of its NestedTokens.
    """
    b, h, n, d = q.shape
    out = torch.empty_like(q)
    for row, tokens in enumerate(rows):
        for i in range(n):
            per_query = {id(token): regularised_lookup(q[row, :, i], token) for token in tokens}
            for head in range(h):
                logits = k[row, head] @ q[row, head, i] / d**0.5
                values = v[row, head].clone()
                for token in tokens:
                    for c in token.columns:
                        logit = logits[c].clone()  # autograd keeps it while `logits` changes
                        logits[c] = torch.maximum(logit, token.weight * logit)
                        here = token.strength * (
                            1 if token.region is None else token.region[row % len(token.region), i]
                        )
                        star = per_query[id(token)](v[row, :, c])[head]
                        values[c] = v[row, head, c] + here * (star - v[row, head, c])  # eq. 2
                out[row, head, i] = logits.softmax(0) @ values  # eq. 3
    return out


def regularised_lookup(q, token):
    """v* of one query [H, D] (eq. 1), as a function of the textual value [H, D] that it replaces."""
    star = torch.stack(
        [
            (token.keys[0, head] @ q[head] / q.shape[-1] ** 0.5).softmax(0) @ token.values[0, head]
            for head in range(len(q))
        ]
    )

    def regularise(textual):
        factor = token.norm_factor * textual.norm() / star.norm()
        if token.norm == "off":
            return star
        return star * (factor if token.norm == "rescale" else min(factor, torch.tensor(1.0, dtype=star.dtype)))

    return regularise
