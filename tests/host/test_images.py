"""Pictures of any kind become what the image encoder expects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import make_clip_vision

from nested_attention.crop import FITS
from nested_attention.host.adapters import subject_of
from nested_attention.host.images import as_rgb, encode, features, fit


@pytest.fixture(scope="module")
def vision():
    return make_clip_vision()


@pytest.fixture(scope="module")
def photo():
    path = Path(__file__).parents[2] / "assets" / "astronaut.png"
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float()[None] / 255


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(224, 224), (1, 1), (37, 501), (513, 64)])
@pytest.mark.parametrize("how", FITS)
def test_any_picture(channels, size, how):
    seen = fit(as_rgb(torch.rand(2, *size, channels)), 224, how)
    assert seen.shape == (2, 224, 224, 3) and seen.isfinite().all() and seen.min() >= 0 and seen.max() <= 1


def test_fits(photo):
    wide = photo[:, 100:300]
    crop, pad, squash = (fit(wide, 64, how) for how in FITS)
    middle = fit(wide[:, :, 156:356], 64, "center crop")
    torch.testing.assert_close(crop, middle, atol=0.04, rtol=0)
    assert (pad[:, :18] - 0.5).abs().max() < 0.01 and (pad[:, 24:40] - 0.5).abs().max() > 0.2
    assert not torch.allclose(crop, squash)


@pytest.mark.parametrize("height, width, rows, columns", [(5, 8, (1, 6), (0, 8)), (8, 4, (0, 8), (2, 6))])
def test_pad_is_grey_on_both_sides(height, width, rows, columns):
    """An odd pixel of it goes below or to the right."""
    picture = torch.randint(0, 256, (1, height, width, 3)) / 255
    expected = torch.full((1, 8, 8, 3), 128 / 255)
    expected[:, slice(*rows), slice(*columns)] = picture
    torch.testing.assert_close(fit(picture, 8, "pad"), expected)


def test_squash_shows_all_of_the_picture():
    bands = torch.tensor([0.0, 0.4, 0.4, 1.0]).repeat_interleave(16)  # of a picture 16 high and 64 wide
    seen = fit(bands.expand(1, 3, 16, 64).movedim(1, -1), 16, "squash")
    torch.testing.assert_close(
        seen[0, :, [1, 8, 14], 0], torch.tensor([0.0, 0.4, 1.0]).expand(16, 3), atol=0.01, rtol=0
    )


def test_alpha_and_mask_leave_the_rest_grey(photo):
    alpha = torch.zeros(1, *photo.shape[1:3], 1)
    alpha[:, :, :256] = 1
    rgba = as_rgb(torch.cat([photo, alpha], dim=-1))
    masked = as_rgb(photo, alpha[..., 0])
    for image in (rgba, masked):
        assert torch.equal(image[:, :, :256], photo[:, :, :256]) and (image[:, :, 256:] == 0.5).all()
    for none in (0.0, 0.004):  # what Load Image gives beside a picture, and beside one that is opaque
        assert torch.equal(as_rgb(photo, torch.full((1, 64, 64), none)), photo)
    half = torch.full_like(photo[..., :1], 0.5)
    both = as_rgb(torch.cat([photo, half], dim=-1), alpha[..., 0] / 2)
    torch.testing.assert_close(both[:, :, :256], 0.375 + photo[:, :, :256] / 4)
    assert (both[:, :, 256:] == 0.5).all()


def test_masks_of_a_batch(photo):
    """One for each or one for all; an empty one is none."""
    photos, half = photo.expand(3, -1, -1, -1), torch.zeros(1, *photo.shape[1:3])
    half[:, :, :256] = 1
    one, none = as_rgb(photo, half), torch.zeros_like(half)
    assert torch.equal(as_rgb(photos, torch.cat([half, none, half])), torch.cat([one, photo, one]))
    assert torch.equal(as_rgb(photos, half), one.expand(3, -1, -1, -1))
    for pictures, count in ((photos, 2), (photo, 3)):
        with pytest.raises(ValueError, match=f"{count} masks for {len(pictures)} pictures"):
            as_rgb(pictures, half.expand(count, -1, -1))


def test_empty_picture_is_said():
    with pytest.raises(ValueError, match="image is empty"):
        as_rgb(torch.zeros(0, 64, 64, 3))


def test_what_the_encoder_saw_is_what_it_encoded(vision, photo, adapter):
    """Encoding the fitted picture equals the host's own preprocessing of the photo."""
    config = adapter.config
    seen, found = encode(vision, photo, None, "center crop", config)
    torch.testing.assert_close(found, vision.encode_image(photo).last_hidden_state)
    again, _ = encode(vision, seen, None, "center crop", config)
    assert torch.equal(again, seen)


def test_a_photo_of_no_numbers_is_no_subject(vision, photo, adapter):
    _, found = encode(vision, photo * torch.nan, None, "center crop", adapter.config)
    with pytest.raises(ValueError, match="'person.safetensors' makes of this photo values that are no numbers"):
        subject_of(adapter, found)


def test_feature_layers_differ(vision, photo, adapter):
    from dataclasses import replace

    last, penultimate = (
        features(vision, fit(photo, 32, "squash"), replace(adapter.config, feature_layer=layer))
        for layer in ("last", "penultimate")
    )
    assert last.shape == penultimate.shape and not torch.allclose(last, penultimate)


def test_image_encoder_of_the_wrong_width(photo, adapter):
    with pytest.raises(ValueError, match="width 48, the connected image encoder gives 64"):
        encode(make_clip_vision(width=64), photo, None, "center crop", adapter.config)
