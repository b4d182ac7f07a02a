"""A subject: the nested tokens that an adapter's Q-Former made of its photos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import write_tensors

FORMAT = "nested_attention_subject"


@dataclass(frozen=True)
class Subject:
    """Nested tokens [1, M, C], the fingerprint of the adapter that made them, and its file name as a hint."""

    tokens: Tensor
    adapter: str
    adapter_name: str = ""


def join_photos(tokens: Tensor, how: str) -> Tensor:
    """Nested tokens [B, M, C] of several photos of one subject, as one set [1, M', C].

    concatenate: one softmax over all photos' tokens, M' = B M. average: the mean token, M' = M.
    """
    if how == "average":
        return tokens.mean(0, keepdim=True)
    return tokens.reshape(1, -1, tokens.shape[-1])


def combine(a: Subject, b: Subject, mode: str, weight: float) -> Subject:
    """One subject of two. blend: (1 - weight) a + weight b. concatenate: both sets of tokens, whatever the weight."""
    if a.adapter != b.adapter:
        raise ValueError(
            f"The two subjects were made by different adapters ({a.adapter_name or a.adapter} and "
            f"{b.adapter_name or b.adapter}). Encode both photos with the same adapter."
        )
    ours, theirs = a.tokens, b.tokens.to(a.tokens)  # one may come from a file, the other from the GPU
    if mode == "concatenate":
        return Subject(torch.cat((ours, theirs), dim=1), a.adapter, a.adapter_name)
    if a.tokens.shape != b.tokens.shape:
        raise ValueError(
            f"Blending needs subjects of equally many tokens, these have {a.tokens.shape[1]} and {b.tokens.shape[1]}. "
            "Encode several photos with 'average', or combine with 'concatenate'."
        )
    return Subject(torch.lerp(ours, theirs, weight), a.adapter, a.adapter_name)


def save_subject(subject: Subject, path: str | Path) -> None:
    """Write a subject as safetensors, atomically."""
    metadata = {"format": FORMAT, "adapter": subject.adapter, "adapter_name": subject.adapter_name}
    write_tensors(path, {"tokens": subject.tokens}, metadata)


def load_subject(path: str | Path) -> Subject:
    """Read a subject. Raises ValueError where the file is something else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{Path(path).name} is no saved subject (its tensors: {', '.join(list(file.keys())[:4])}). "
                    "Choose a file written by Save Subject."
                )
            tokens = file.get_tensor("tokens").clone()
            if tokens.ndim != 3 or len(tokens) != 1 or 0 in tokens.shape or not tokens.is_floating_point():
                raise ValueError(
                    f"{Path(path).name} cannot be read as a saved subject: its tokens are {tokens.dtype} of shape "
                    f"{tuple(tokens.shape)}."
                )
            if not tokens.isfinite().all():
                raise ValueError(f"{Path(path).name} cannot be read as a saved subject: its tokens are no numbers.")
            # Windows has other separators, and files are shared.
            return Subject(tokens, metadata["adapter"], metadata["adapter_name"].replace("\\", "/"))
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{Path(path).name} cannot be read as a saved subject: {error}") from error
