"""Nested attention: prompt tokens whose value depends on the image query (paper, eq. 1-3).

B batch, H heads, N image queries, T text tokens, S subject columns among them, M nested tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Literal["off", "rescale", "clamp"]
NORMS: tuple[Norm, ...] = get_args(Norm)


@dataclass(frozen=True)
class NestedToken:
    """One subject in one attention layer: where its token stands and what is looked up there.

    columns    positions of its token among the T text tokens, at least one
    keys       Kn, [B or 1, H, M, D]
    values     Vn, [B or 1, H, M, D]
    strength   factor on the change that the subject makes (1: the paper, 0: none)
    weight     lambda, the token weight (1: the prompt's own attention)
    norm       norm regularisation of the per-query values, and its alpha
    region     where the subject may show, [B or 1, N] in 0..1, or None for everywhere
    subject    whose token this is: tokens of different subjects compete for a place
    competition   how much each place goes to one subject (0: shared as the prompt has it); the largest counts for all
    """

    columns: tuple[int, ...]
    keys: Tensor
    values: Tensor
    strength: float = 1.0
    weight: float = 1.0
    norm: Norm = "rescale"
    norm_factor: float = 2.0
    region: Tensor | None = None
    subject: int = 0
    competition: float = 0.0


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H*D] to [B, H, N, D], as a view."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, N, D] to [B, N, H*D]."""
    return x.transpose(1, 2).flatten(2)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm_over_heads(x: Tensor) -> Tensor:
    """L2 norm over the concatenated heads, [B, H, N, D] to [B, 1, N, 1], at least in fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=(1, 3), keepdim=True, dtype=dtype)


def split(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
    """As `Tensor.split`. What stays whole, as one subject of one column does, costs nothing."""
    return (x,) if len(sizes) == 1 else x.split(sizes, dim)


def per_query_values(q: Tensor, token: NestedToken) -> Tensor:
    """v*, [B, H, N, D]: what the subject is at each image position (eq. 1)."""
    nested = [x if len(q) == 1 else x.expand(len(q), -1, -1, -1) for x in (token.keys, token.values)]
    if q.device.type == "cpu" or (q.is_cuda and torch.version.hip is None):
        return fused_attention(q, *nested)
    return attention_in_chunks(q, *nested)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain attention, [B, H, N, D]."""
    if q.device.type == "mps" and q.dtype == torch.float16:  # there it multiplies before it scales, and overflows
        return attention_in_fp32(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attention_in_chunks(q: Tensor, k: Tensor, v: Tensor, chunk: int = 1024) -> Tensor:
    """The same, so many queries at a time: bounds the memory where all probabilities may be made."""
    return torch.cat([fused_attention(part, k, v) for part in q.split(chunk, dim=2)], dim=2)


def attention_in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def has_fused_lse(q: Tensor) -> bool:
    """Whether `text_attention` is one fused kernel that gives the log-sum-exp for nothing, and no gradient of it."""
    return not torch.is_grad_enabled() and (q.device.type == "cpu" or has_flash_attention(q))


def has_flash_attention(q: Tensor) -> bool:
    """Whether FlashAttention takes queries of this shape and precision, on Nvidia's GPUs: what the host runs too."""
    if not q.is_cuda or torch.version.hip is not None or q.shape[-1] % 8:
        return False
    return torch.backends.cuda.can_use_flash_attention(torch.backends.cuda.SDPAParams(q, q, q, None, 0.0, False, False))


def text_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Plain attention [B, H, N, D] over the text, and the log-sum-exp [B, H, N] of its logits where that is free."""
    if not has_fused_lse(q):
        return fused_attention(q, k, v), None
    scale = q.shape[-1] ** -0.5
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, scale=scale)
    return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)[:2]


def at_columns(x: Tensor, tokens: list[NestedToken], dim: int) -> Tensor:
    """What stands at the subjects' S columns. Slices: a list of indices would have to travel to the device."""
    columns = [c for token in tokens for c in token.columns]
    if len(columns) == 1:
        return x.narrow(dim, columns[0], 1)
    return torch.stack([x.select(dim, c) for c in columns], dim=dim)


def subject_logits(q: Tensor, k: Tensor, tokens: list[NestedToken], lse: Tensor | None = None) -> Tensor:
    """Logits of the subject columns, [B, H, N, S] at least in fp32; less the text's log-sum-exp [B, H, N], if given."""
    scale = q.shape[-1] ** -0.5
    q, k = at_least_fp32(q), at_least_fp32(at_columns(k, tokens, 2)).transpose(-1, -2)
    if lse is None:
        return q @ k * scale
    flat = torch.baddbmm(lse.flatten(0, 1)[..., None], q.flatten(0, 1), k.flatten(0, 1), beta=-1, alpha=scale)
    return flat.unflatten(0, q.shape[:2])


def subject_probabilities(q: Tensor, k: Tensor, tokens: list[NestedToken], chunk: int = 2048) -> Tensor:
    """p_s, [B, H, N, S] at least in fp32, from the whole softmax, a chunk of queries at a time."""
    keys = at_least_fp32(k).transpose(-1, -2) * k.shape[-1] ** -0.5
    softmax = ((at_least_fp32(part) @ keys).softmax(-1) for part in q.split(chunk, dim=2))
    # Contiguous: a view would keep all of its softmax.
    return torch.cat([at_columns(part, tokens, 3).contiguous() for part in softmax], dim=2)


def personalize(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: list[NestedToken],
    text: Tensor | None = None,
    lse: Tensor | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Add to attention output what the subjects' tokens change in it (eq. 2 and 3), in place.

    With p_s the attention probability of a subject's token, replacing its value V_s by v* changes the output by
    p_s (v* - V_s). So `out` may hold anything besides the text attention, and no per-query copy of V is made.

    out        attention output [B, H, N, D], changed in place and returned
    q, k, v    the layer's queries [B, H, N, D] and text keys and values [B, H, T, D]
    text, lse  what `text_attention(q, k, v)` gave, where it was called
    observe    is called with the p_s of all columns that are used here in the end, [B, H, N, S]
    """
    v_s = at_columns(v, tokens, 2)
    p = subject_probabilities(q, k, tokens) if lse is None else subject_logits(q, k, tokens, lse).exp()
    if any(token.weight != 1 for token in tokens):
        text = text_attention(q, k, v)[0] if text is None else text
        p, change = raise_tokens(p, subject_logits(q, k, tokens), v_s, text, tokens)
        out += change
    if competing(tokens):
        settled = settle(p, tokens)
        out += ((settled - p) @ v_s.to(p.dtype)).to(out.dtype)
        p = settled
    if observe is not None:
        observe(p)
    sizes = [len(token.columns) for token in tokens]
    for token, part, shared in zip(tokens, split(p, sizes, -1), split(v_s, sizes, 2), strict=True):
        swap_values(out, q, reached(part, token), shared, token)
    return out


def swap_values(out: Tensor, q: Tensor, p: Tensor, v_s: Tensor, token: NestedToken) -> None:
    """Add p_s (v* - V_s) of one subject's columns to `out`: p [B, H, N, S], V_s [B, H, S, D]."""
    # Only `out` changes in place: the rest is kept for gradients. One pass a term, and none makes a tensor of its size.
    # A factor of 1 and a sum of one are left out: on a fast GPU, starting a kernel takes longer than the kernel.
    star = per_query_values(q, token)
    scaled = p if token.norm == "off" else p * norm_scale(star, v_s, token)
    each = [1] * p.shape[-1]
    weight = scaled if len(each) == 1 else scaled.sum(-1, keepdim=True)
    # Where v* is 0 the scale is beyond fp16, and infinity times 0 would be no number.
    out.addcmul_(star, weight.clamp_max(torch.finfo(star.dtype).max).to(star.dtype))
    for part, shared in zip(split(p.to(v_s.dtype), each, -1), split(v_s, each, 2), strict=True):
        out.addcmul_(part, shared, value=-1)


def reached(p: Tensor, token: NestedToken) -> Tensor:
    """How much of the token's change is made: p_s [B, H, N, S] times its strength, within its region."""
    if token.region is not None:
        return p * (token.strength * token.region[:, None, :, None])
    return p if token.strength == 1 else p * token.strength


def norm_scale(star: Tensor, v_s: Tensor, token: NestedToken) -> Tensor:
    """Factor on v* by the norm regularisation, which is not off, [B, 1, N, S].

    rescale: v* gets alpha times the norm of the textual value V_s [B, H, S, D] that it replaces. clamp: at most that.
    """
    length = norm_over_heads(star).clamp_min(1e-30)
    scale = token.norm_factor * norm_over_heads(v_s).transpose(2, 3) / length
    return scale.clamp_max(1) if token.norm == "clamp" else scale


def raise_tokens(
    p: Tensor, logits: Tensor, v_s: Tensor, text: Tensor, tokens: list[NestedToken]
) -> tuple[Tensor, Tensor]:
    """Token weight lambda: logit_s becomes max(logit_s, lambda logit_s) in the text's softmax.

    p, logits   probabilities and logits of the subject columns, [B, H, N, S]
    Returns the new probabilities, and the change of the plain text attention, [B, H, N, D].
    """
    parts = zip(tokens, split(logits, [len(token.columns) for token in tokens], -1), strict=True)
    raised = torch.cat([torch.maximum(part, token.weight * part) for token, part in parts], dim=-1)
    gain = torch.expm1((raised - logits).clamp_max(80))
    total = 1 + (p * gain).sum(-1, keepdim=True)
    change = (text + (p * gain) @ v_s.to(p.dtype)) / total - text
    return p * (1 + gain) / total, change.to(text.dtype)


def competing(tokens: list[NestedToken]) -> bool:
    """Whether any place has to be settled between subjects."""
    return any(token.competition for token in tokens) and len({token.subject for token in tokens}) > 1


def settle(p: Tensor, tokens: list[NestedToken]) -> Tensor:
    """Competition c: each place goes mostly to one subject, p_s becomes P p_s a_s^c / sum_t p_t a_t^c.

    P is the subjects' probability together, so the rest of the prompt loses nothing. a_s, a subject's claim to the
    place, is its probability averaged over the heads: all heads favour the same subject. With a region only what lies
    in it, p_s times the region, competes; the rest of p_s stays with the word as plain text.

    p   probabilities of the subject columns, [B, H, N, S]; a subject's columns keep their proportions
    """
    owners = [token.subject for token in tokens for _ in token.columns]
    regions = {token.subject: 1.0 if token.region is None else token.region[:, None] for token in tokens}
    columns = p.unbind(-1)
    sums = {s: sum(x for x, owner in zip(columns, owners, strict=True) if owner == s) for s in regions}
    mass = torch.stack(list(sums.values()), dim=-1)
    inside = torch.stack([sums[s] * region for s, region in regions.items()], dim=-1)
    strongest = max(token.competition for token in tokens)
    share = (inside.log() + strongest * inside.mean(1, keepdim=True).log()).softmax(-1)
    # Where no subject has a claim the shares are 0 / 0, and stay as they were.
    settled = torch.where(share.isnan(), mass, mass - inside + inside.sum(-1, keepdim=True) * share)
    factors = dict(zip(sums, (settled / mass.clamp_min(torch.finfo(p.dtype).tiny)).unbind(-1), strict=True))
    return torch.stack([x * factors[owner] for x, owner in zip(columns, owners, strict=True)], dim=-1)
