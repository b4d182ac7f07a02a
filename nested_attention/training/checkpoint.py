"""Checkpoints of a training: there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..files import write_atomically

FORMAT = 2  # 1 had the moments of the Q-Former last


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Raises OSError where the disk is full or the folder cannot be written."""
    try:
        write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    except RuntimeError as error:  # torch's zip writer hides the system's error in its own
        raise OSError(f"{error.__context__ or error}") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Raises ValueError where the file is no checkpoint of this version."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # PyTorch has many for a damaged file
        # What it says of pickles is how to load them all the same.
        reason = "it holds something else" if isinstance(error, (UnpicklingError, KeyError)) else f"{error}" or "empty"
        raise ValueError(
            f"{path} cannot be read as a training checkpoint ({reason}). If that stays so, choose another output to "
            "begin anew."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is no training checkpoint of this version. Begin anew in another folder.")
    return state
