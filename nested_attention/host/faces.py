"""Faces as the host's landmark detector gives them: MediaPipe's mesh of 478 points, in pixels, for each picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..alignment import parse_faces

# Points of the mesh, left and right as seen in the picture. An eye is both corners and two points of each lid: those
# six of the 68 landmarks that the FFHQ recipe reads.
EYES = ((33, 160, 158, 133, 153, 144), (362, 385, 387, 263, 373, 380))
MOUTH = (61, 291)

ORDERS = {
    "largest first": lambda box: (box[0] - box[2]) * (box[3] - box[1]),
    "left to right": lambda box: box[0] + box[2],
    "as detected": lambda box: 0,
}


def find_faces(
    images: Tensor, landmarks: dict[str, Any] | None, points: str, order: str, index: int
) -> list[Tensor | None]:
    """A face [4, 2] for each picture of a batch [B, H, W, C], or None where it has none; `points` go before landmarks.

    order, index   which one of several detected faces: the index-th, from 0, in one of ORDERS
    Raises ValueError where neither is given, or they belong to other pictures.
    """
    if points.strip():
        faces = parse_faces(points)
        if len(faces) != len(images):
            raise ValueError(f"There are points of {len(faces)} faces for {len(images)} pictures. Give one face each.")
        return faces
    if landmarks is None:
        raise ValueError(
            "Connect the landmarks of Detect Face Landmarks (MediaPipe), made from the same picture, or give five "
            "points in 'points'."
        )
    frames, size = landmarks["frames"], tuple(landmarks["image_size"])
    if size != tuple(images.shape[1:3]) or len(frames) != len(images):
        raise ValueError(
            f"The landmarks are of {len(frames)} pictures of {size[1]} x {size[0]} pixels, the image is {len(images)} "
            f"of {images.shape[2]} x {images.shape[1]}. Detect them in the very picture that is aligned."
        )
    chosen = [sorted(faces, key=lambda face: ORDERS[order](face["bbox_xyxy"]))[index : index + 1] for faces in frames]
    return [mesh_points(found[0]["landmarks_xy"]) if found else None for found in chosen]


def mesh_points(mesh: Any) -> Tensor:
    """Eyes and mouth corners [4, 2] of a mesh [478, 2]."""
    mesh = torch.as_tensor(mesh, dtype=torch.float64)
    return torch.stack([mesh[list(eye)].mean(0) for eye in EYES] + [mesh[i] for i in MOUTH])
