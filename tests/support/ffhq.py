"""The published recipe of the FFHQ dataset, from 68 landmarks to the aligned picture, in NumPy, SciPy and Pillow.

Landmarks count pixels from the middle of the first one, as dlib does.
"""

from __future__ import annotations

import numpy as np
import scipy.ndimage
from PIL import Image


def quadrilateral(landmarks):
    """Corners [4, 2]: top left, bottom left, bottom right, top right."""
    eye_left, eye_right = landmarks[36:42].mean(0), landmarks[42:48].mean(0)
    eyes, eye_to_eye = (eye_left + eye_right) / 2, eye_right - eye_left
    eye_to_mouth = (landmarks[48] + landmarks[54]) / 2 - eyes
    x = eye_to_eye - eye_to_mouth[::-1] * [-1, 1]
    x /= np.hypot(*x)
    x *= max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8)
    y = x[::-1] * [-1, 1]
    c = eyes + eye_to_mouth * 0.1
    return np.stack([c - x - y, c - x + y, c + x + y, c + x - y])


def align(photo: Image.Image, quad, output_size=512, transform_size=2048) -> Image.Image:
    quad = quad.copy()
    qsize = np.hypot(*(quad[3] - quad[0]))

    shrink = int(np.floor(qsize / output_size * 0.5))
    if shrink > 1:
        photo = photo.resize([int(np.rint(n / shrink)) for n in photo.size], Image.Resampling.LANCZOS)
        quad, qsize = quad / shrink, qsize / shrink

    border = max(int(np.rint(qsize * 0.1)), 3)
    low, high = np.floor(quad.min(0)).astype(int), np.ceil(quad.max(0)).astype(int)
    box = (*np.maximum(low - border, 0), *np.minimum(high + border, photo.size))
    photo, quad = photo.crop([int(n) for n in box]), quad - box[:2]

    low, high = np.floor(quad.min(0)).astype(int), np.ceil(quad.max(0)).astype(int)
    before, after = np.maximum(-low + border, 0), np.maximum(high - photo.size + border, 0)
    if max(*before, *after) > border - 4:
        least = int(np.rint(qsize * 0.3))
        (left, top), (right, bottom) = np.maximum(before, least), np.maximum(after, least)
        pixels = np.pad(np.float32(photo), ((top, bottom), (left, right), (0, 0)), "reflect")
        h, w, _ = pixels.shape
        y, x, _ = np.ogrid[:h, :w, :1]
        mask = np.maximum(
            1 - np.minimum(np.float32(x) / left, np.float32(w - 1 - x) / right),
            1 - np.minimum(np.float32(y) / top, np.float32(h - 1 - y) / bottom),
        )
        sigma = qsize * 0.02
        pixels += (scipy.ndimage.gaussian_filter(pixels, [sigma, sigma, 0]) - pixels) * np.clip(mask * 3 + 1, 0, 1)
        pixels += (np.median(pixels, axis=(0, 1)) - pixels) * np.clip(mask, 0, 1)
        photo = Image.fromarray(np.uint8(np.clip(np.rint(pixels), 0, 255)))
        quad = quad + [left, top]

    corners = (quad + 0.5).flatten().tolist()
    size = (transform_size, transform_size)
    photo = photo.transform(size, Image.Transform.QUAD, corners, Image.Resampling.BILINEAR)
    return photo.resize((output_size, output_size), Image.Resampling.LANCZOS)
