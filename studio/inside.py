"""What goes on inside of nested attention: the figures of the paper, and their numbers, of the small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nested_attention.host.adapters import load_adapter, subject_of
from nested_attention.host.apply import apply_subject
from nested_attention.host.base import Base
from nested_attention.host.inspection import inspect, lookups
from nested_attention.host.recording import record_model
from nested_attention.inspection.drawing import to_image
from nested_attention.inspection.views import nested_attention, top_tokens

from .evidence import PLACEHOLDERS, Case, Method, draw, see

POINTS = [(0.42, 0.48), (0.5, 0.2), (0.5, 0.85)]  # an eye, the hair, the clothes
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


@torch.inference_mode()
def inside(base: Base, path: Path, cases: list[Case], figure: Path) -> dict[str, list[float]]:
    """Draws the sheet of the first case to `figure`; returns how much of the nested attention one and two tokens have.

    Quantiles (SHARES) of the largest probability, and of the two largest together, over all queries of all layers at
    the last step and over cases; each probability is the mean over heads, as in the paper's stem plots. The same with
    tokens that are alike taken together, and of the last one's, which the warm start made the plain noun's.
    """
    adapter, kind = load_adapter(str(path), path.parent.name), "people"
    tops: list[Tensor] = []
    distinct: list[int] = []
    for case in cases:
        photos = case.photos[kind][:1]
        bound = subject_of(adapter, see(base, photos, adapter))
        together = alike(bound.subject.tokens[0])
        distinct.append(int(together.any(0).sum()))
        model, clip = apply_subject(base.model, base.clip, bound, placeholder=PLACEHOLDERS[kind])
        model, recording = record_model(model)
        picture = draw(base, ready(model, clip, case.prompt), case)
        for lookup in lookups(recording, 0, sorted({layer for layer, _ in recording.record.queries})):
            weights = nested_attention(lookup, range(lookup.q.shape[2]))
            joined = weights @ together
            noun = joined @ together[-1]
            tops.append(torch.cat((*(top_tokens(x)[0].cumsum(-1) for x in (weights, joined)), noun[:, None]), dim=1))
        if case is cases[0]:
            shown = {"photos": photos, "clip_vision": base.clip_vision}
            view = inspect(recording, bound, picture.movedim(0, -1)[None], layers="", points=POINTS, **shown)
            to_image(view.draw("sheet")[0]).save(figure)
    rows = np.quantile(torch.cat(tops).numpy(), SHARES, axis=0).T.tolist()
    names = ("top 1", "top 2", "top 1 distinct", "top 2 distinct", "noun")
    return {"quantile": list(SHARES), "distinct": distinct, **dict(zip(names, rows, strict=True))}


def alike(tokens: Tensor, within: float = 0.05) -> Tensor:
    """The first of tokens [M, C] that each is like, by the length of what they differ in; one-hot [M, M]."""
    near = torch.cdist(tokens, tokens) < within * tokens.norm(dim=1)
    return F.one_hot(near.float().argmax(1), len(tokens)).to(tokens.dtype)


def ready(*drawn_with: Any) -> Method:
    """Model, CLIP and prompt that are there already, for any case."""
    return lambda *_: drawn_with
