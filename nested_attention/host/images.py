"""A user's picture, of any shape and kind, as the image encoder sees it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import comfy.clip_model
import comfy.utils
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..adapter import AdapterConfig
from ..crop import GREY, Fit
from .connected import require
from .notice import warn

UNLIKE = 0.05  # of the logarithm of an aspect ratio
EMPTY = 0.01  # the host's loader gives opaque pictures masks of up to 0.004
ENCODERS = {1024: "CLIP ViT-L/14", 1280: "CLIP ViT-H/14 (the image encoder of IP-Adapter)", 1664: "CLIP ViT-bigG/14"}


def as_rgb(images: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, H, W, C] with 1, 2, 3 or 4 channels, to RGB; what alpha or mask [B or 1, H, W] leave out becomes grey.

    Raises ValueError where there is no picture, or another number of masks.
    """
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"The image is empty (its shape is {tuple(images.shape)}). Connect a picture of the subject.")
    channels = images.shape[-1]
    color = images[..., :3] if channels >= 3 else images[..., :1].expand(*images.shape[:3], 3)
    keep = images[..., -1:] if channels in (2, 4) else None
    if mask is not None:
        masks = torch.stack(masks_of(mask, len(images)))[:, None].float()
        # An empty one is the host's word for none.
        masks = torch.where(masks.amax((2, 3), keepdim=True) < EMPTY, 1.0, masks)
        resized = rearrange(F.interpolate(masks, images.shape[1:3], mode="bilinear"), "b 1 h w -> b h w 1").to(color)
        keep = resized if keep is None else keep * resized
    return color if keep is None else torch.lerp(torch.full_like(color, GREY), color, keep)


def fit(images: Tensor, size: int, how: Fit) -> Tensor:
    """RGB [B, H, W, 3] to [B, size, size, 3] by the host's own preprocessing of image encoders.

    center crop: the middle square. pad: the whole picture on grey. squash: the whole picture, distorted.
    """
    if how == "pad":
        h, w = images.shape[1:3]
        left, top = (max(h, w) - w) // 2, (max(h, w) - h) // 2
        border = (0, 0, left, max(h, w) - w - left, top, max(h, w) - h - top)
        images = F.pad(images, border, value=GREY)
    seen = comfy.clip_model.clip_preprocess(
        images.float(), size=size, mean=[0, 0, 0], std=[1, 1, 1], crop=how != "squash"
    )
    return rearrange(seen, "b c h w -> b h w c")


def masks_of(mask: Tensor | None, pictures: int) -> list[Tensor | None]:
    """A mask [H, W] for each picture, from the host's [H, W] or [B, H, W], or None for each."""
    if mask is None:
        return [None] * pictures
    masks = mask.reshape(-1, *mask.shape[-2:])
    if len(masks) not in (1, pictures):
        raise ValueError(f"There are {len(masks)} masks for {pictures} pictures. Connect one, or one for each.")
    return list(masks.expand(pictures, -1, -1))


def check_mask(mask: Tensor | None, images: Tensor, node_id: str | None) -> None:
    """Warn where a mask [..., h, w] is of another picture than [B, H, W, C]."""
    if mask is not None and mask.max() >= EMPTY and differ_in_aspect(mask.shape, images.shape[1:3]):
        warn(
            "The mask is of another shape than the image, and is stretched over it. Connect the mask of this very "
            "image: where it was cropped or aligned before, that of the photo no longer fits.",
            node_id,
        )


def differ_in_aspect(first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether shapes [..., height, width] are of different aspect ratios, by more than rounding to latents takes."""
    ratio = first[-1] / first[-2] * second[-2] / second[-1]
    return abs(math.log(ratio)) > UNLIKE


def as_batch(pictures: list[Tensor], beyond: float = GREY) -> Tensor:
    """Pictures [H, W, 3] as one batch as high and wide as any of them: all of each, as large as goes, in its middle."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    batch = torch.full((len(pictures), height, width, 3), beyond).to(pictures[0])
    for into, picture in zip(batch, pictures, strict=True):
        scale = min(height / picture.shape[0], width / picture.shape[1])
        h, w = (round(side * scale) for side in picture.shape[:2])
        resized = comfy.utils.common_upscale(rearrange(picture, "h w c -> 1 c h w"), w, h, "bicubic", "disabled")
        top, left = (height - h) // 2, (width - w) // 2
        into[top : top + h, left : left + w] = rearrange(resized.clamp(0, 1), "1 c h w -> h w c")
    return batch


def features(clip_vision: object, seen: Tensor, config: AdapterConfig) -> Tensor:
    """Features [B, I, image_dim] of fitted pictures. Raises ValueError where the encoder is not the adapter's."""
    check_encoder(clip_vision, config)
    output = clip_vision.encode_image(seen)
    result = output.last_hidden_state if config.feature_layer == "last" else output.penultimate_hidden_states
    check_width(result.shape[-1], config)
    return result


def check_encoder(clip_vision: object, config: AdapterConfig) -> None:
    """Before it computes anything, as far as it says what it is."""
    width = getattr(clip_vision, "config", {}).get("hidden_size")
    if width is not None:
        check_width(width, config)


def check_width(width: int, config: AdapterConfig) -> None:
    if width != config.image_dim:
        needed = ENCODERS.get(config.image_dim, "another image encoder")
        raise ValueError(
            f"The adapter reads image features of width {config.image_dim}, the connected image encoder gives {width}"
            f" ({ENCODERS.get(width, 'of unknown kind')}). Load {needed} with Load CLIP Vision."
        )


def encode(clip_vision: object, images: Tensor, mask: Tensor | None, how: str, config: AdapterConfig):
    """What the encoder saw, [B, S, S, 3], and its features of it, [B, I, image_dim]."""
    require(clip_vision=clip_vision)
    check_encoder(clip_vision, config)
    with torch.no_grad():
        seen = fit(as_rgb(images, mask), clip_vision.image_size, how)
        return seen, features(clip_vision, seen, config)
