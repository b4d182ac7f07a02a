"""The same cases drawn in several ways, one below the other, to look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap

from PIL import Image
from torch import Tensor

from nested_attention.inspection.drawing import beside, captioned, stacked, to_image

SIDE, WIDTH = 128, 15  # of a picture in pixels, of a line above it in letters


def gallery(cases: Iterable[tuple[Sequence[Tensor], Mapping[str, Tensor]]], path: Path) -> None:
    """A row for each case: its photos [H, W, 3], then the pictures [3, H, W] by the names of their ways."""
    rows = []
    for photos, drawn in cases:
        images = [large(x) for x in (*photos, *(picture.movedim(0, -1) for picture in drawn.values()))]
        if not rows:
            names = headings(["photo", *[""] * (len(photos) - 1), *drawn])
            images = [captioned(image, name) for image, name in zip(images, names, strict=True)]
        rows.append(beside(images))
    stacked(rows).save(path)


def headings(names: Sequence[str]) -> list[str]:
    """In as many lines as the longest takes."""
    lines = [wrap(name, WIDTH) for name in names]
    height = max(map(len, lines))
    return ["\n".join([*some, *[""] * (height - len(some))]) for some in lines]


def large(picture: Tensor) -> Image.Image:
    return to_image(picture).resize((SIDE, SIDE), Image.Resampling.NEAREST)
