"""Names, shapes and metadata of adapters in the paper's size: 1024 nested tokens, every cross-attention layer."""

from __future__ import annotations

import torch

from nested_attention.adapter import AdapterConfig, NestedAdapter
from nested_attention.dialects import METADATA_KEY

QUERIES = 1024
VIT_H_WIDTH = 1280
# Inner width of each cross-attention layer in diffusers' order: down, up, mid.
LAYERS_SD15 = (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280)
LAYERS_SDXL = (640,) * 4 + (1280,) * 20 + (1280,) * 30 + (640,) * 6 + (1280,) * 10

Shapes = dict[str, tuple[int, ...]]


def configuration(name: str) -> AdapterConfig:
    """The configuration for a name like "person-sdxl": class word, base model."""
    class_word, base = name.split("-")
    sdxl = base == "sdxl"
    return AdapterConfig(
        image_dim=VIT_H_WIDTH,
        dim=1280 if sdxl else 768,
        depth=4,
        heads=20 if sdxl else 12,
        dim_head=64,
        queries=QUERIES,
        output_dim=2048 if sdxl else 768,
        layers=LAYERS_SDXL if sdxl else LAYERS_SD15,
        class_word=class_word,
    )


def described(name: str) -> tuple[Shapes, dict[str, str]]:
    """Shapes and file metadata of the named adapter."""
    config = configuration(name)
    with torch.device("meta"):
        state = NestedAdapter(config).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    return shapes, {METADATA_KEY: config.to_json()}
