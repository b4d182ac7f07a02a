"""Small pieces of pictures, in Pillow, which ComfyUI brings along: heat maps, stem plots, captions, rows and columns.

Tensors of pictures are [H, W, 3] in 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .views import Point, resize

PANEL = 288
GAP = 14
TEXT, TITLE = 17, 26
INK, PAPER, PALE = "#1c1c1c", "white", "#8a8a8a"
MARKS = ("#e6194b", "#2f7fe6", "#2fa84f", "#f08a00", "#9a35c9", "#00a5a5", "#c98a00", "#e35fb5")
# Black through purple and orange to pale yellow: evenly brighter, so that it reads in grey too.
HEAT = (
    (0.0, 0.0, 0.02),
    (0.23, 0.06, 0.44),
    (0.55, 0.16, 0.51),
    (0.87, 0.29, 0.41),
    (0.99, 0.62, 0.32),
    (0.99, 0.99, 0.75),
)


# What systems have for the letters that Pillow's own font lacks; those of East Asia first, which have the others too.
SYSTEM_FONTS = (
    "msyh.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "arial.ttf", "Arial.ttf", "DejaVuSans.ttf", "LiberationSans-Regular.ttf",
)  # fmt: skip
NO_LETTER = "\U0010ffff"


@lru_cache
def font(size: int, name: str = "") -> ImageFont.ImageFont | None:
    """Pillow's own, or the system's of this name, if there is one."""
    with suppress(OSError):
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


@lru_cache(maxsize=1024)
def font_of(line: str, size: int) -> ImageFont.ImageFont:
    """The first font that has all letters of a line; Pillow's own where none has."""
    found = (font(size, name) for name in ("", *SYSTEM_FONTS))
    return next((each for each in found if each and not any(lacks(each, c) for c in set(line))), font(size))


def lacks(font: ImageFont.ImageFont, letter: str) -> bool:
    return bytes(font.getmask(letter)) == bytes(font.getmask(NO_LETTER)) and letter != " "


def to_image(x: Tensor) -> Image.Image:
    return Image.fromarray((x.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3) / 255


def heat_colors(x: Tensor) -> Tensor:
    """Values [h, w] in 0..1 to colours [h, w, 3]."""
    anchors = torch.tensor(HEAT)
    place = x.clamp(0, 1) * (len(HEAT) - 1)
    below = place.long().clamp_max(len(HEAT) - 2)
    return torch.lerp(anchors[below], anchors[below + 1], (place - below)[..., None])


def photograph(picture: Tensor, width: int = PANEL) -> Image.Image:
    image = to_image(picture[..., :3])
    return image.resize((width, max(1, round(width * image.height / image.width))), Image.Resampling.LANCZOS)


def heat_over(picture: Tensor, heat: Tensor, top: float, width: int = PANEL) -> Image.Image:
    """A map [h, w] as heat over the dimmed picture; `top` is the value of the brightest colour."""
    image = photograph(picture, width).convert("L").convert("RGB")
    value = resize(heat.float().cpu() / max(top, 1e-12), (image.height, image.width)).clamp(0, 1)
    return to_image(0.3 * to_tensor(image) + 0.7 * heat_colors(value))


def color_map(colors: Tensor, shape: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """Colours [h * w, 3] of a layer's places, of the shape (h, w), at a size in pixels; each place a square."""
    return to_image(colors.view(*shape, 3)).resize(size, Image.Resampling.NEAREST)


def swatch(color: Tensor, size: tuple[int, int]) -> Image.Image:
    return to_image(color.view(1, 1, 3)).resize(size, Image.Resampling.NEAREST)


def owner_map(picture: Tensor, shares: Tensor, width: int = PANEL) -> Image.Image:
    """Each place in its owner's colour over the picture; the paler, the less it is one subject's."""
    image = photograph(picture, width).convert("L").convert("RGB")
    big = F.interpolate(shares[None].float(), (image.height, image.width), mode="bilinear")[0]
    most, owner = big.max(0)
    even = 1 / len(shares) if len(shares) > 1 else 0.0
    certain = ((most - even) / (1 - even)).clamp(0, 1)[..., None]
    colors = torch.tensor([mark_color(i) for i in range(len(shares))])[owner]
    return to_image(torch.lerp(to_tensor(image), colors, 0.15 + 0.55 * certain))


def mark_color(index: int) -> tuple[float, float, float]:
    value = int(MARKS[index % len(MARKS)][1:], 16)
    return (value >> 16) / 255, (value >> 8 & 255) / 255, (value & 255) / 255


def around(at: Point, radius: float) -> tuple[float, float, float, float]:
    x, y = at
    return x - radius, y - radius, x + radius, y + radius


def with_marks(image: Image.Image, points: Sequence[Point]) -> Image.Image:
    """Numbered circles at points in 0..1."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    for i, (x, y) in enumerate(points):
        at = x * image.width, y * image.height
        draw.ellipse(around(at, 12), fill=MARKS[i % len(MARKS)], outline=PAPER, width=2)
        draw.text(at, str(i + 1), fill=PAPER, font=font(TEXT - 2), anchor="mm")
    return image


def stems(weights: Tensor, color: str, size: tuple[int, int], top: float) -> Image.Image:
    """Weights [M] as a stem plot, from 0 to `top`; the two largest are named by their token."""
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    left, right, floor, ceiling = 58, size[0] - 12, size[1] - 30, 24
    draw.line((left, ceiling, left, floor, right, floor), fill=PALE, width=1)
    for value in (0.0, top):
        y = floor - (floor - ceiling) * value / max(top, 1e-12)
        draw.text((left - 6, y), f"{value:.3g}", fill=INK, font=font(TEXT - 3), anchor="rm")
    draw.text((left, size[1] - 4), "0", fill=INK, font=font(TEXT - 3), anchor="ls")
    draw.text((right, size[1] - 4), f"nested token {len(weights) - 1}", fill=INK, font=font(TEXT - 3), anchor="rs")
    places = [
        (left + 3 + (right - left - 6) * i / max(len(weights) - 1, 1), floor - (floor - ceiling) * w / max(top, 1e-12))
        for i, w in enumerate(weights.tolist())
    ]
    for x, y in places:
        draw.line((x, floor, x, y), fill=color, width=2)
    for i in weights.topk(min(2, len(weights))).indices.tolist():
        x, y = places[i]
        draw.ellipse(around((x, y), 4), fill=color)
        draw.text((min(max(x, left + 20), right - 20), y - 5), str(i), fill=INK, font=font(TEXT - 3), anchor="ms")
    return image


def captioned(image: Image.Image, caption: str) -> Image.Image:
    """An image under its caption of one or more lines, which are cut to its width."""
    lines = caption.split("\n")
    height = (TEXT + 5) * len(lines) + 3
    result = Image.new("RGB", (image.width, image.height + height), PAPER)
    result.paste(image, (0, height))
    draw = ImageDraw.Draw(result)
    for i, line in enumerate(lines):
        draw.text((0, i * (TEXT + 5)), cut(line, image.width), fill=INK, font=font_of(line, TEXT))
    return result


def cut(line: str, width: int) -> str:
    if font_of(line, TEXT).getlength(line) <= width:
        return line
    while line and font_of(line, TEXT).getlength(line + "...") > width:
        line = line[:-1]
    return line + "..."


def beside(images: Sequence[Image.Image]) -> Image.Image:
    width = sum(image.width for image in images) + GAP * (len(images) - 1)
    result = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    x = 0
    for image in images:
        result.paste(image, (x, 0))
        x += image.width + GAP
    return result


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    height = sum(image.height for image in images) + GAP * (len(images) - 1)
    result = Image.new("RGB", (max(image.width for image in images), height), PAPER)
    y = 0
    for image in images:
        result.paste(image, (0, y))
        y += image.height + GAP
    return result


def grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    return stacked([beside(images[i : i + columns]) for i in range(0, len(images), columns)])


def titled(title: str, body: Image.Image, note: str = "") -> Image.Image:
    """A section: its title, a line of explanation, its body."""
    lines = [(line, size) for text, size in ((title, TITLE), (note, TEXT)) for line in text.split("\n") if line]
    width = max(body.width, *(round(font_of(line, size).getlength(line)) for line, size in lines))
    height = sum(size + 8 for _, size in lines)
    result = Image.new("RGB", (width, body.height + height), PAPER)
    draw, y = ImageDraw.Draw(result), 0
    for line, size in lines:
        draw.text((0, y), line, fill=INK, font=font_of(line, size))
        y += size + 8
    result.paste(body, (0, height))
    return result


def framed(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", (image.width + 2 * GAP, image.height + 2 * GAP), PAPER)
    result.paste(image, (GAP, GAP))
    return result
