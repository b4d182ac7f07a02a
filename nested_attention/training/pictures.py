"""Pictures: read, cut, made to fit, and varied without changing whom they show.

All are [1, H, W, C] in 0..1. Reading needs Pillow, which comes with ComfyUI.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Size = tuple[int, int]  # width, height
Box = tuple[float, float, float, float]  # left, top, right, bottom
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # also under another's suffix; others run programs
XMP = "XML:com.adobe.xmp"
MOST_PIXELS, MOST_ASPECT = 100_000_000, 20


class Source(Protocol):
    """Where a picture's bytes are: a file (Path), or a member of a shard."""

    @property
    def name(self) -> str: ...

    def open(self, mode: str) -> Any: ...


@contextmanager
def opened(source: Source) -> Iterator[Any]:
    """A picture file in Pillow. Raises OSError or ValueError where it cannot be read."""
    from PIL import Image

    try:
        with source.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            yield image
    # How Pillow speaks of broken files, of odd EXIF and of huge pictures.
    except (SyntaxError, TypeError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def picture_size(source: Source) -> Size:
    """Width and height as displayed, from the file's header.

    Raises ValueError where it cannot be read, or would fill the memory.
    """
    with opened(source) as image:
        width, height = image.size
        if image.format == "TIFF":
            width, height = image.tag_v2[256], image.tag_v2[257]  # some versions of Pillow have turned its size already
        told = {*image.info} & {"exif", "Raw profile type exif"} or "Orientation" in str(image.info.get(XMP))
        known = image.format != "PNG" or told  # or Pillow would read all of it to look for one
        if known and image.getexif().get(0x0112) in range(5, 9):  # orientations that swap the sides
            width, height = height, width
    if width * height > MOST_PIXELS:
        raise ValueError(f"the picture of {width} x {height} pixels is too large: make it smaller")
    if max(width, height) > MOST_ASPECT * min(width, height):
        raise ValueError(f"the picture of {width} x {height} pixels is too narrow: cut it")
    return width, height


def read_picture(source: Source) -> Tensor:
    """[1, H, W, 3], or 4 channels where there is transparency."""
    return pixels_of(read_image(source))


def read_image(source: Source) -> Any:
    """As Pillow's, upright, with three channels of 8 bits, or four where there is transparency."""
    from PIL import ImageOps

    with opened(source) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits
            image = image.convert("I").point(lambda value: value * (1 / 257))
        return image.convert("RGBA" if image.has_transparency_data else "RGB")


def pixels_of(image: Any) -> Tensor:
    """A picture of Pillow's with channels of 8 bits as [1, H, W, C]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, image.height, image.width, -1).float() / 255


def reduced(image: Any, size: Size) -> Any:
    """A picture of Pillow's, smaller by a whole number where it stays at least twice as large as `size`.

    As numbers in fp32, the photo of a camera would need many times the memory, and seconds.
    """
    factor = min(image.width // size[0], image.height // size[1]) // 2
    return image.reduce(factor) if factor > 1 else image


def bucket_sizes(resolution: int, step: int = 64) -> list[Size]:
    """Sizes in multiples of `step`, of at most the area of a square of this side and aspects from 1:2 to 2:1."""
    step = min(step, max(8, resolution // 8 // 8 * 8))
    widths = range(step, 2 * resolution + 1, step)
    sizes = [(w, resolution**2 // w // step * step) for w in widths]
    return [(w, h) for w, h in sizes if h and 0.5 <= w / h <= 2]


def nearest_bucket(size: Size, sizes: list[Size]) -> Size:
    """The size of the nearest aspect ratio, and the largest of equally near ones."""
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - aspect), -s[0] * s[1]))


def covering(size: Size, target: Size) -> tuple[Size, Size]:
    """What a picture of this size is resized to so that it covers the target, and left and top of its middle there."""
    scale = max(t / s for t, s in zip(target, size, strict=True))
    w, h = (max(t, round(s * scale)) for t, s in zip(target, size, strict=True))
    return (w, h), ((w - target[0]) // 2, (h - target[1]) // 2)


def cover(image: Tensor, size: Size) -> Tensor:
    """Resized to cover this size, and the middle of it."""
    (w, h), (left, top) = covering((image.shape[2], image.shape[1]), size)
    planes = rearrange(image, "b h w c -> b c h w")
    resized = F.interpolate(planes, (h, w), mode="bicubic", antialias=True).clamp(0, 1)
    return rearrange(resized[..., top : top + size[1], left : left + size[0]], "b c h w -> b h w c")


def within(size: Size, side: int) -> Size:
    """This size, smaller if one of its sides is longer."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def at_most(image: Tensor, side: int) -> Tensor:
    """The picture, smaller if one of its sides is longer than this."""
    size = (image.shape[2], image.shape[1])
    return image if within(size, side) == size else cover(image, within(size, side))


def cut(image: Any, box: Box) -> Any:
    """A part of a picture of Pillow's, of one pixel at least."""
    left, top, right, bottom = (round(x) for x in box)
    left, top = min(left, image.width - 1), min(top, image.height - 1)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def vary(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The same subject in another photo: flipped, moved, turned and lit a little differently."""
    flip, *draws = (torch.rand(8, generator=generator) * 2 - 1).tolist()
    turn, zoom, right, down, brightness, contrast, saturation = (strength * x for x in draws)
    angle, scale = math.radians(10) * turn, 1 + 0.1 * zoom
    mirror = -1 if strength and flip < 0 else 1
    cos, sin, aspect = math.cos(angle) * scale, math.sin(angle) * scale, image.shape[1] / image.shape[2]
    affine = torch.tensor([[[mirror * cos, -sin * aspect, 0.05 * right], [mirror * sin / aspect, cos, 0.05 * down]]])
    pixels = rearrange(image, "b h w c -> b c h w")
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    color = pixels[:, :3]
    grey = color.mean(1, keepdim=True)
    color = grey + (color - grey) * (1 + 0.2 * saturation)
    color = (color - 0.5) * (1 + 0.2 * contrast) + 0.5 + 0.1 * brightness
    return rearrange(torch.cat((color.clamp(0, 1), pixels[:, 3:]), dim=1), "b c h w -> b h w c")
