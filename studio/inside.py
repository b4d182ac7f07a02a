"""What goes on inside of nested attention: the figures of the paper, and their numbers, of the small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    the last step and over cases; each probability is the mean over heads, as in the paper's stem plots.
    """
    adapter, kind = load_adapter(str(path), path.parent.name), "people"
    tops: list[np.ndarray] = []
    for case in cases:
        photos = case.photos[kind][:1]
        bound = subject_of(adapter, see(base, photos, adapter))
        model, clip = apply_subject(base.model, base.clip, bound, placeholder=PLACEHOLDERS[kind])
        model, recording = record_model(model)
        picture = draw(base, ready(model, clip, case.prompt), case)
        for lookup in lookups(recording, 0, sorted({layer for layer, _ in recording.record.queries})):
            weights = nested_attention(lookup, range(lookup.q.shape[2]))
            tops.append(top_tokens(weights)[0].cumsum(-1).numpy())
        if case is cases[0]:
            shown = {"photos": photos, "clip_vision": base.clip_vision}
            view = inspect(recording, bound, picture.movedim(0, -1)[None], layers="", points=POINTS, **shown)
            to_image(view.draw("sheet")[0]).save(figure)
    one, two = np.quantile(np.concatenate(tops), SHARES, axis=0).T
    return {"quantile": list(SHARES), "top 1": one.tolist(), "top 2": two.tolist()}


def ready(*drawn_with: Any) -> Method:
    """Model, CLIP and prompt that are there already, for any case."""
    return lambda *_: drawn_with
