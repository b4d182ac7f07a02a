"""Writes what was trained to the files that ship with the pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nested_attention.files import write_tensors
from nested_attention.host.studio import EMBEDDING, FILE

from .words import UNKNOWN, Words

LICENSE = (
    "Apache-2.0. Trained on pictures drawn by this repository and by DiceBear's avataaars (art by Pablo Stanley, free "
    "for personal and commercial use)."
)


def export(painter: nn.Module, namer: nn.Module, words: Words, weights: Path, notes: dict[str, Any]) -> Path:
    """One safetensors file in fp16: the UNet, the text encoder with the words it knows, the image encoder."""
    text = painter.text.model.state_dict()
    table = text[EMBEDDING]
    text[EMBEDDING] = torch.cat((table[:UNKNOWN], table[UNKNOWN + 1 :]))
    parts: dict[str, dict[str, Tensor]] = {
        "unet": painter.unet.state_dict(),
        "text": text,
        "vision": namer.vision.state_dict(),
        "words": {"ids": torch.tensor(words.ids), "unknown": table[UNKNOWN]},
    }
    tensors = {
        f"{part}.{name}": value.half() if value.is_floating_point() else value
        for part, state in parts.items()
        for name, value in state.items()
    }
    write_tensors(weights / FILE, tensors, {"license": LICENSE, "training": json.dumps(notes)})
    return weights / FILE
