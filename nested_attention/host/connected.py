"""Sockets that a loader hands on empty: a checkpoint without a text encoder, say, gives None for its CLIP."""

from __future__ import annotations

from typing import Any

LOADERS = {
    "model": "Load Checkpoint or Load Diffusion Model",
    "clip": "Load CLIP or DualCLIPLoader",
    "vae": "Load VAE",
    "clip_vision": "Load CLIP Vision",
}


def require(**parts: Any) -> None:
    """Raises ValueError where one of these, named as in LOADERS, is None."""
    for name, part in parts.items():
        if part is None:
            raise ValueError(
                f"{name} is empty: the file that its loader read holds none, or nothing is connected. Load one with "
                f"{LOADERS[name]}."
            )
