"""Put a subject into a model and its CLIP."""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP
from torch import Tensor

from . import KEY
from .adapters import BoundSubject
from .connected import require
from .layers import check_fit, cross_attention_sites
from .run import AppliedSubject, Personalization
from .text import add_placeholder


def apply_subject(
    model: Any, clip: Any, bound: BoundSubject, *, placeholder: str, class_word: str = "", **choices: Any
) -> tuple[Any, Any]:
    """Clones of model and CLIP in which `placeholder` stands for the subject; `choices` are AppliedSubject's.

    Chains like a LoRA: each call adds one subject to those already there.
    Raises ValueError where adapter, model, placeholder or class word do not fit.
    """
    require(model=model, clip=clip)
    adapter = bound.adapter
    check_fit(adapter.config, cross_attention_sites(model.model.diffusion_model), adapter.name)
    learned: dict[str, Tensor] = {} if class_word else dict(adapter.patcher.model.embeddings)
    clip, ledger = add_placeholder(clip, placeholder, class_word or adapter.config.class_word, learned)

    if (region := choices.get("region")) is not None and 0 in region.shape:
        raise ValueError(f"The region of {placeholder} has no pixels (its shape is {tuple(region.shape)}).")
    subject = AppliedSubject(placeholder, bound.subject.tokens, adapter, **choices)
    before = next(iter(model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)), Personalization((), ()))
    if any(s.placeholder == placeholder for s in before.subjects):
        raise ValueError(
            f"The model already has a subject {placeholder}. Give each subject a placeholder of its own, and chain "
            "model and CLIP together from one Apply Subject to the next."
        )
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    model.add_wrapper_with_key(
        WrappersMP.OUTER_SAMPLE,
        KEY,
        Personalization((*before.subjects, subject), (*before.ledgers, ledger)),
    )
    return model, clip
