"""What is costly to make and always the same, kept: the latents of pictures and the states of captions."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..files import read_tensors, write_tensors
from .config import Cached
from .troubles import Troubles

log = logging.getLogger("nested_attention")
Tensors = dict[str, Tensor]
CONTENT = "content"


class Cache:
    """Tensors on the CPU by a key that says all they depend on: made each time, kept in memory, or kept in files.

    The files may be another training's. One that is damaged is made again; a full disk is a trouble as configured.
    """

    def __init__(self, kind: Cached, folder: Path, troubles: Troubles):
        self.kind, self.folder, self.troubles = kind, folder, troubles
        self.kept: dict[str, Tensors] = {}

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        if self.kind == "off":
            return make()
        if self.kind == "disk":
            path = self.folder / key[:2] / f"{key}.safetensors"
            return self.read(path) or self.write(path, make())
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def read(self, path: Path) -> Tensors | None:
        try:
            tensors, told = read_tensors(path)
            if CONTENT not in told:  # of an earlier version
                return None
            if told[CONTENT] != content_key(tensors):
                raise OSError("it holds other numbers than were written")
            return tensors
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged and is made again: %s", path, error)
            return None

    def write(self, path: Path, tensors: Tensors) -> Tensors:
        try:
            write_tensors(path, tensors, {CONTENT: content_key(tensors)}, shared=True)
        except OSError as error:
            self.troubles.report(f"{error}.")
        return tensors


def content_key(tensors: Tensors) -> str:
    return cache_key(*(part for named in sorted(tensors.items()) for part in named))


def cache_key(*parts: Any) -> str:
    """Parts are what repr tells apart, and tensors, by their content."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            part = (part.dtype, tuple(part.shape))
        digest.update(f"{part!r}\n".encode())
    return digest.hexdigest()
