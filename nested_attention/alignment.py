"""FFHQ alignment: eyes and mouth define an oriented square, which is cut out of the picture.

The recipe is that of the FFHQ dataset (Karras et al., A Style-Based Generator Architecture for GANs, 2019). Points are
(x, y) in pixels from the picture's top left edge: the middle of its first pixel is (0.5, 0.5). Pictures are [H, W, C].
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 512
OVERSAMPLING = 4
LEAST = 4.0  # pixels of a face's square
FINE = 4.0  # pixels of sigma, to which wider blurs are brought


def parse_faces(text: str) -> list[Tensor]:
    """Faces [4, 2] from five points each: the eyes, the nose, the corners of the mouth, as x and y.

    Raises ValueError where the numbers make no whole faces.
    """
    numbers = [float(x) for x in re.findall(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?", text)]
    if not numbers or len(numbers) % 10:
        raise ValueError(
            "A face is five points, 10 numbers: x and y of the left eye, the right eye, the nose, the left and the "
            f"right corner of the mouth. The text has {len(numbers)} numbers."
        )
    faces = torch.tensor(numbers, dtype=torch.float64).reshape(-1, 5, 2)
    return [upright(face[[0, 1, 3, 4]]) for face in faces]


def upright(face: Tensor) -> Tensor:
    """A face [4, 2] with left and right as they are seen: some tools write the subject's own left first."""
    left, right, *mouth = face
    across, down = right - left, (mouth[0] + mouth[1] - left - right) / 2
    return face if across[0] * down[1] > across[1] * down[0] else face[[1, 0, 3, 2]]


def turned(v: Tensor) -> Tensor:
    """A vector (x, y) turned by 90 degrees, from right to down."""
    return torch.stack((-v[1], v[0]))


def square_of(face: Tensor) -> Tensor:
    """Corners [4, 2] of the square of a face: top left, bottom left, bottom right, top right.

    face   [4, 2]: left eye, right eye, left and right corner of the mouth, as they are seen in the picture
    Raises ValueError where the points coincide, nearly, or lie nowhere.
    """
    left, right, mouth_left, mouth_right = face
    eyes = (left + right) / 2
    across, down = right - left, (mouth_left + mouth_right) / 2 - eyes
    x = across - turned(down)
    half = max(2.0 * across.norm(), 1.8 * down.norm())
    if not (x.norm() > 0 and LEAST / 2 < half < math.inf):
        raise ValueError(f"The points {face.tolist()} are no face: eyes and mouth coincide.")
    x = x / x.norm() * half
    y = turned(x)
    middle = eyes + 0.1 * down
    return torch.stack((middle - x - y, middle - x + y, middle + x + y, middle + x - y))


def cut_square(image: Tensor, square: Tensor, size: int = SIZE) -> Tensor:
    """What a square's corners [4, 2] hold of a picture, upright, [size, size, C]; outside it, mirrored and blurred.

    Raises ValueError where they hold nothing of it.
    """
    image, square = shrink(image, square, size)
    image, square = crop(image, square)
    image, square = pad(image, square)
    return warp(image, square, size)


def side(square: Tensor) -> float:
    return float((square[3] - square[0]).norm())


def shrink(image: Tensor, square: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Large pictures are first made smaller by a whole number, against aliasing."""
    factor = int(side(square) / size * 0.5)
    if factor <= 1:
        return image, square
    height, width = (max(1, round(n / factor)) for n in image.shape[:2])
    return resize(image, height, width), square / factor


def resize(image: Tensor, height: int, width: int) -> Tensor:
    resized = F.interpolate(image.movedim(-1, 0)[None], (height, width), mode="bicubic", antialias=True)
    return resized[0].movedim(0, -1).clamp(0, 1)


def border_of(square: Tensor) -> int:
    return max(round(side(square) * 0.1), 3)


def bounds(square: Tensor) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels around a square."""
    return (*map(math.floor, square.amin(0).tolist()), *map(math.ceil, square.amax(0).tolist()))


def crop(image: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """The part of the picture around the square: what follows costs by the pixel."""
    border = border_of(square)
    left, top, right, bottom = bounds(square)
    left, top = max(left - border, 0), max(top - border, 0)
    part = image[top : max(bottom + border, 0), left : max(right + border, 0)]
    if 0 in part.shape:
        raise ValueError(f"The face lies outside the picture of {image.shape[1]} x {image.shape[0]} pixels.")
    return part, square - square.new_tensor((left, top))


def pad(image: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Where the square reaches over the picture's border: mirror the picture there, blurred, fading to its median."""
    border, (height, width) = border_of(square), image.shape[:2]
    left, top, right, bottom = bounds(square)
    beyond = [max(n + border, 0) for n in (-left, -top, right - width, bottom - height)]
    if max(beyond) <= border - 4:
        return image, square
    left, top, right, bottom = (max(n, round(side(square) * 0.3)) for n in beyond)
    rows, columns = (mirrored(n, *ends, image.device) for n, ends in ((height, (top, bottom)), (width, (left, right))))
    image = image[rows][:, columns]
    outside = torch.maximum(depth(len(rows), top, bottom, image)[:, None], depth(len(columns), left, right, image))
    outside = outside[..., None]
    image = torch.lerp(image, blur(image, side(square) * 0.02), (outside * 3 + 1).clamp(0, 1))
    image = torch.lerp(image, image.flatten(0, 1).median(0).values.expand_as(image), outside.clamp(0, 1))
    return image, square + square.new_tensor((left, top))


def mirrored(n: int, before: int, after: int, device: torch.device) -> Tensor:
    """Indices of n pixels continued on both sides by reflection, as often as needed."""
    if n == 1:
        return torch.zeros(before + 1 + after, dtype=torch.long, device=device)
    index = torch.arange(-before, n + after, device=device) % (2 * n - 2)
    return torch.minimum(index, 2 * n - 2 - index)


def depth(n: int, before: int, after: int, like: Tensor) -> Tensor:
    """How far outside each of n pixels lies: 1 at the outer edges, 0 where the picture begins, then negative."""
    i = torch.arange(n, device=like.device, dtype=like.dtype)
    return torch.maximum(1 - i / before, 1 - (n - 1 - i) / after)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur, with the border repeated outwards.

    A wide one is made on a smaller picture: the same to the eye, and some backends unfold a kernel into gigabytes.
    """
    (height, width), factor = image.shape[:2], max(int(sigma / FINE), 1)
    sigma /= factor
    reach = max(int(4 * sigma + 0.5), 1)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=image.device) / max(sigma, 1e-6)) ** 2)
    kernel = (kernel / kernel.sum()).to(image.dtype)
    ends = factor * (reach + 1)
    beyond = (ends, ends + -width % factor, ends, ends + -height % factor)
    planes = F.avg_pool2d(F.pad(image.movedim(-1, 0)[:, None], beyond, mode="replicate"), factor)
    planes = F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))
    planes = F.interpolate(planes, scale_factor=factor, mode="bilinear")
    return planes[:, 0, factor : factor + height, factor : factor + width].movedim(0, -1)


def warp(image: Tensor, square: Tensor, size: int) -> Tensor:
    """The square's content, read bilinearly at several times the size and made smaller."""
    fine = size * OVERSAMPLING
    steps = (torch.arange(fine, dtype=square.dtype) + 0.5) / fine
    top_left, bottom_left, _, top_right = square
    points = top_left + steps[None, :, None] * (top_right - top_left) + steps[:, None, None] * (bottom_left - top_left)
    grid = (points * 2 / square.new_tensor((image.shape[1], image.shape[0])) - 1).to(image)
    planes = image.movedim(-1, 0)[None]
    read = F.grid_sample(planes, grid[None], mode="bilinear", padding_mode="border", align_corners=False)
    return resize(read[0].movedim(0, -1), size, size)
