"""The same cases drawn in several ways, one below the other, to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch import Tensor

from nested_attention.host.base import Base
from nested_attention.inspection.drawing import beside, captioned, stacked, to_image

from .evidence import Case, Method, draw

SIDE = 128


def gallery(base: Base, ways: Mapping[str, tuple[Method, float]], cases: list[Case], path: Path) -> None:
    """A row for each case: its photos, then what each way and strength draws."""
    rows = []
    for i, case in enumerate(cases):
        photos = {"photo" if j == 0 else "": photo[0] for j, photo in enumerate(case.photos.values())}
        drawn = {name: draw(base, method, case, strength).movedim(0, -1) for name, (method, strength) in ways.items()}
        shown = {name: large(picture) for name, picture in (photos | drawn).items()}
        rows.append(beside([captioned(p, name) if i == 0 else p for name, p in shown.items()]))
    stacked(rows).save(path)


def large(picture: Tensor) -> Image.Image:
    return to_image(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)
