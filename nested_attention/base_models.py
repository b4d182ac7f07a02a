"""Which base model a set of cross-attention layers belongs to: for words in messages, never for decisions."""

from __future__ import annotations

from collections.abc import Sequence

# (cross-attention layers, context width) of the published UNets of the Stable Diffusion family
KNOWN = {
    (16, 768): "Stable Diffusion 1.5",
    (16, 1024): "Stable Diffusion 2.x",
    (70, 2048): "SDXL",
    (44, 1280): "SDXL refiner",
    (34, 2048): "SSD-1B",
    (15, 2048): "Segmind Vega",
    (7, 192): "the small model that comes with the pack",
}


def describe(layers: Sequence[int], context: int) -> str:
    """'SDXL (70 cross-attention layers, context width 2048)', or without the name where it is not known."""
    shape = f"{len(layers)} cross-attention layers, context width {context}"
    name = KNOWN.get((len(layers), context))
    return f"{name} ({shape})" if name else f"an unknown base model ({shape})"
