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
            probabilities = []
            for head in range(h):
                logits = k[row, head] @ q[row, head, i] / d**0.5
                for token in tokens:
                    for c in token.columns:
                        logit = logits[c].clone()  # autograd keeps it while `logits` changes
                        logits[c] = torch.maximum(logit, token.weight * logit)
                probabilities.append(logits.softmax(0))
            if any(token.competition for token in tokens):
                probabilities = settled(probabilities, tokens, row, i)
            for head in range(h):
                values = v[row, head].clone()
                for token in tokens:
                    here = token.strength * region_at(token, row, i)
                    for c in token.columns:
                        star = per_query[id(token)](v[row, :, c])[head]
                        values[c] = v[row, head, c] + here * (star - v[row, head, c])  # eq. 2
                out[row, head, i] = probabilities[head] @ values  # eq. 3
    return out


def region_at(token, row, i):
    return 1 if token.region is None else token.region[row % len(token.region), i]


def settled(probabilities, tokens, row, i):
    """Competition at one place: in each head the subjects' mass is shared by p_s a_s^c, with a_s a mean over heads.

    Of a subject with a region, only the part of p_s that the region leaves here is at stake.
    """
    c = max(token.competition for token in tokens)
    columns, regions = {}, {}
    for token in tokens:
        columns[token.subject] = columns.get(token.subject, ()) + token.columns
        regions[token.subject] = float(region_at(token, row, i))
    claims = {s: regions[s] * sum(float(p[list(columns[s])].sum()) for p in probabilities) for s in columns}
    result = [p.clone() for p in probabilities]
    for p, new in zip(probabilities, result, strict=True):
        masses = {s: float(p[list(columns[s])].sum()) for s in columns}
        at_stake = {s: masses[s] * regions[s] for s in columns}
        wanted = {s: at_stake[s] * float(claims[s] / max(max(claims.values()), 1e-300)) ** c for s in columns}
        if sum(wanted.values()) > 0:
            for s in columns:
                share = masses[s] - at_stake[s] + sum(at_stake.values()) * wanted[s] / sum(wanted.values())
                for column in columns[s]:
                    new[column] = p[column] * share / masses[s]
    return result


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
