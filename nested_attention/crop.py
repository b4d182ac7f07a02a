"""A subject cut out of its photo by a mask or a box. Pictures are [H, W, C] in 0..1, areas [H, W] in 0..1."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .alignment import blur

Background = Literal["keep", "white", "blur"]
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
Fit = Literal["center crop", "pad", "squash"]
FITS: tuple[Fit, ...] = get_args(Fit)
GREY = 0.5
BLUR = 0.05  # of the crop's longer side


def area_of(height: int, width: int, mask: Tensor | None, box: tuple[int, int, int, int] | None) -> Tensor:
    """Where the subject is, [height, width]: the mask [h, w], which is resized; the box (x, y, width, height); or both.

    Raises ValueError where neither is given, or nothing is left.
    """
    if mask is None and box is None:
        raise ValueError("Connect a mask of the subject, or give a box: its width and height must not be 0.")
    area = torch.ones(height, width)
    if mask is not None:
        area = F.interpolate(mask[None, None].float().cpu(), (height, width), mode="bilinear")[0, 0]
        if not (area > 0.5).any():
            raise ValueError("The mask is empty, or nowhere above one half: paint the subject, or invert the mask.")
    if box is not None:
        x, y, w, h = box
        inside = torch.zeros(height, width)
        inside[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = 1
        if not (area * inside > 0.5).any():
            what = "outside the picture" if mask is None else "where the mask is empty"
            raise ValueError(f"The box (x {x}, y {y}, {w} x {h}) lies {what} ({width} x {height} pixels).")
        area = area * inside
    return area


def crop_of(area: Tensor, margin: float, square: bool) -> tuple[slice, slice]:
    """Rows and columns of the crop around an area; they reach over the picture where a square needs it.

    margin   space around the subject, as a part of its longer side
    square   same width and height: at most the picture's shorter side, unless the subject itself is longer
    """
    ends = [(int(n[0]), int(n[-1]) + 1) for n in ((area > 0.5).any(axis).nonzero()[:, 0] for axis in (1, 0))]
    lengths = [stop - start for start, stop in ends]
    space = 2 * round(margin * max(lengths))
    if square:
        sides = [max(max(lengths), min(max(lengths) + space, *area.shape))] * 2
    else:
        sides = [min(length + space, limit) for length, limit in zip(lengths, area.shape, strict=True)]
    rows, columns = (span(*e, side, limit) for e, side, limit in zip(ends, sides, area.shape, strict=True))
    return rows, columns


def span(start: int, stop: int, side: int, limit: int) -> slice:
    """`side` pixels around start to stop, moved into 0 to limit; where they do not fit in there, around all of it."""
    first = (limit - side) // 2 if side > limit else min(max((start + stop - side) // 2, 0), limit - side)
    return slice(first, first + side)


def cut(image: Tensor, area: Tensor, margin: float, square: bool, background: Background) -> Tensor:
    """The subject's part of a picture, [h, w, C]. What lies beyond the picture is grey, or white as the background."""
    rows, columns = crop_of(area, margin, square)
    height, width = area.shape
    inside = slice(max(rows.start, 0), rows.stop), slice(max(columns.start, 0), columns.stop)
    part, keep = image[inside], area[inside][..., None].to(image)
    if background == "white":
        part = torch.lerp(torch.ones_like(part), part, keep)
    elif background == "blur":
        part = torch.lerp(blur(part, BLUR * max(part.shape[:2])), part, keep)
    beyond = (max(-columns.start, 0), max(columns.stop - width, 0), max(-rows.start, 0), max(rows.stop - height, 0))
    return F.pad(part, (0, 0, *beyond), value=1.0 if background == "white" else GREY)
