"""Cutting a subject out of its photo: face alignment against the published recipe, and crops by mask or box."""

from __future__ import annotations

from pathlib import Path

import ffhq
import numpy as np
import pytest
import torch
from comfy.utils import common_upscale
from PIL import Image

from nested_attention import alignment
from nested_attention.alignment import cut_square, parse_faces, square_of
from nested_attention.crop import area_of, crop_of, cut
from nested_attention.host.faces import EYES, MOUTH, find_faces
from nested_attention.host.images import as_batch, masks_of

ASSETS = Path(__file__).parents[2] / "assets"

# Points of the face mesh that MediaPipe 0.10.14 found in astronaut.png, in pixels from its edge.
MESH = {
    **{33: (195.2, 100.9), 160: (199.4, 98.1), 158: (206.3, 98.1), 133: (213.3, 103.7), 153: (206.8, 104.3)},
    **{144: (200.1, 103.8), 362: (237.0, 104.9), 385: (244.7, 100.0), 387: (251.9, 100.6), 263: (255.8, 104.3)},
    **{373: (250.0, 106.6), 380: (243.3, 106.2), 61: (201.8, 139.2), 291: (245.0, 141.0)},
}
FIVE = "203.5 101.5, 247.1 103.8, 223.4 130, 201.8 139.2, 245 141"


def photo_of(name):
    return Image.open(ASSETS / name).convert("RGB")


def as_tensor(photo):
    return torch.from_numpy(np.array(photo)).float() / 255


def mesh_of(place=lambda point: point):
    mesh = np.zeros((478, 2), np.float32)
    for i, point in MESH.items():
        mesh[i] = place(np.array(point))
    return mesh


def landmarks_of(size, *frames):
    """What the host's detector gives, of faces as (mesh, box) in each picture."""
    frames = [[{"landmarks_xy": mesh, "bbox_xyxy": np.array(box)} for mesh, box in faces] for faces in frames]
    return {"frames": frames, "image_size": size, "connection_sets": {}}


def recipe_landmarks(mesh):
    """The 68 landmarks that the recipe reads, from their counterparts in the mesh."""
    landmarks = np.zeros((68, 2))
    landmarks[36:42], landmarks[42:48] = mesh[list(EYES[0])], mesh[list(EYES[1])]
    landmarks[[48, 54]] = mesh[list(MOUTH)]
    return landmarks - 0.5


def cropped(box):
    return lambda photo: (photo.crop(box), lambda p: p - box[:2])


def rotated(degrees):
    turn = np.deg2rad(degrees)
    matrix = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return lambda photo: (photo.rotate(degrees, Image.Resampling.BICUBIC), lambda p: (p - 256) @ matrix.T + 256)


def enlarged(factor):
    size = 512 * factor
    return lambda photo: (photo.resize((size, size), Image.Resampling.BICUBIC), lambda p: p * factor)


PHOTOS = {
    "as it is": lambda photo: (photo, lambda p: p),
    "turned": rotated(35),
    "upside down": rotated(180),
    "face at the border": cropped((170, 60, 512, 512)),
    "half of the face": cropped((100, 0, 225, 300)),
    "nothing but the face": cropped((180, 75, 265, 160)),
    "four times as large": enlarged(4),
    "so large that it is shrunk": lambda photo: (
        photo.crop((140, 40, 310, 210)).resize((2040, 2040), Image.Resampling.BICUBIC),
        lambda p: (p - (140, 40)) * 12,
    ),
    "large, turned, at the border": lambda photo: (
        rotated(-20)(photo)[0].resize((1536, 1536)).crop((450, 0, 1200, 750)),
        lambda p: rotated(-20)(photo)[1](p) * 3 - (450, 0),
    ),
}


@pytest.mark.parametrize("case", PHOTOS)
def test_alignment_is_the_published_recipe(case):
    photo, place = PHOTOS[case](photo_of("astronaut.png"))
    mesh = mesh_of(place)
    quad = ffhq.quadrilateral(recipe_landmarks(mesh))
    expected = as_tensor(ffhq.align(photo, quad))

    image = as_tensor(photo)
    landmarks = landmarks_of(image.shape[:2], [(mesh, (0, 0, 1, 1))])
    (face,) = find_faces(image[None], landmarks, "", "largest first", 0)
    square = square_of(face)
    assert np.abs(square.numpy() - 0.5 - quad).max() < 0.01
    aligned = cut_square(image, square)
    assert aligned.shape == (512, 512, 3) and aligned.min() >= 0 and aligned.max() <= 1
    difference = (aligned - expected).abs()
    assert difference.mean() < 0.003 and difference.max() < 0.1


def test_five_points_are_as_good_as_landmarks():
    """Also with the subject's own left first, and whatever stands between the numbers."""
    found = landmarks_of((512, 512), [(mesh_of(), (0, 0, 1, 1))])
    expected = square_of(find_faces(torch.zeros(1, 512, 512, 3), found, "", "as detected", 0)[0])
    other_order = "[[247.1;103.8] [203.5;101.5] [223.4;130] [245;141] [201.8;139.2]]"
    for text in (FIVE, other_order):
        (face,) = parse_faces(text)
        torch.testing.assert_close(square_of(face), expected, atol=0.3, rtol=0)
    assert len(parse_faces(FIVE + "\n" + other_order)) == 2


@pytest.mark.parametrize("text", ["1 2 3", "no numbers", FIVE + " 7"])
def test_points_that_are_no_face(text):
    with pytest.raises(ValueError, match="A face is five points, 10 numbers.* has [0-9]+ numbers"):
        parse_faces(text)


def test_points_that_coincide_or_lie_outside():
    with pytest.raises(ValueError, match="eyes and mouth coincide"):
        square_of(parse_faces("5 5 " * 5)[0])
    for scale in (1e-6, 1e300):
        with pytest.raises(ValueError, match="eyes and mouth coincide|outside"):
            cut_square(torch.zeros(512, 512, 3), square_of(parse_faces(FIVE)[0] * scale))
    assert cut_square(torch.rand(1, 3000, 3), square_of(parse_faces("0 0 2999 0 0 0 0 1 2999 1")[0])).isfinite().all()
    for shift in (-900, 900):
        with pytest.raises(ValueError, match="outside the picture of 512 x 512"):
            cut_square(torch.zeros(512, 512, 3), square_of(parse_faces(FIVE)[0]) + shift)


@pytest.mark.parametrize("order, boxes", [("largest first", "bca"), ("left to right", "cab"), ("as detected", "abc")])
def test_which_face(order, boxes):
    faces = {"a": (100, 0, 110, 20), "b": (90, 0, 260, 60), "c": (0, 0, 30, 30)}
    found = landmarks_of((512, 512), [(mesh_of(lambda p, x=box[0]: p + x), box) for box in faces.values()])
    image = torch.zeros(1, 512, 512, 3)
    eyes = [find_faces(image, found, "", order, i)[0][0, 0].item() for i in range(3)]
    assert [round(x - 203.5) for x in eyes] == [faces[name][0] for name in boxes]
    assert find_faces(image, found, "", order, 3) == [None]


def test_landmarks_of_other_pictures():
    with pytest.raises(ValueError, match="1 pictures of 512 x 300 pixels, the image is 1 of 512 x 512"):
        find_faces(torch.zeros(1, 512, 512, 3), landmarks_of((300, 512), []), "", "as detected", 0)
    with pytest.raises(ValueError, match="points of 1 faces for 2 pictures"):
        find_faces(torch.zeros(2, 512, 512, 3), None, FIVE, "as detected", 0)
    with pytest.raises(ValueError, match="Connect the landmarks"):
        find_faces(torch.zeros(1, 512, 512, 3), None, " ", "as detected", 0)


def area(rows, columns, height=60, width=100):
    mask = torch.zeros(height, width)
    mask[slice(*rows), slice(*columns)] = 1
    return mask


@pytest.mark.parametrize(
    "rows, columns, margin, square, expected",
    [
        ((20, 30), (40, 60), 0.0, False, (20, 30, 40, 60)),
        ((20, 30), (40, 60), 0.1, False, (18, 32, 38, 62)),
        ((20, 30), (40, 60), 0.0, True, (15, 35, 40, 60)),
        ((20, 30), (40, 60), 0.1, True, (13, 37, 38, 62)),
        ((0, 10), (80, 100), 0.1, True, (0, 24, 76, 100)),  # moved inwards from the corner
        ((10, 50), (30, 70), 1.0, True, (0, 60, 20, 80)),  # no wider than the picture allows
        ((10, 50), (5, 95), 0.1, True, (-15, 75, 5, 95)),  # wider than the picture is high
        ((0, 60), (0, 100), 0.5, False, (0, 60, 0, 100)),
    ],
)
def test_crops(rows, columns, margin, square, expected):
    found = crop_of(area(rows, columns), margin, square)
    assert tuple(x for part in found for x in (part.start, part.stop)) == expected


@pytest.mark.parametrize("sigma", [9.0, 40.0])
def test_wide_blurs_are_gaussian(sigma, monkeypatch):
    """Made on a smaller picture, they are the same as without."""
    picture = alignment.resize(torch.rand(20, 30, 3, generator=torch.Generator().manual_seed(0)), 160, 240)
    fast = alignment.blur(picture, sigma)
    monkeypatch.setattr(alignment, "FINE", 1e9)
    slow = alignment.blur(picture, sigma)
    assert (fast - slow).abs().max() < 2 / 255


def test_backgrounds():
    photo, subject = torch.rand(60, 100, 3), area((20, 30), (40, 60))
    keep, white, blurred = (cut(photo, subject, 0.25, True, how) for how in ("keep", "white", "blur"))
    assert torch.equal(keep, photo[10:40, 35:65])
    inside = (slice(10, 20), slice(5, 25))
    for each in (white, blurred):
        assert torch.equal(each[inside], keep[inside])
    assert (white[:10] == 1).all() and (white[:, :5] == 1).all()
    assert 0 < blurred[:10].std() < 0.6 * keep[:10].std()
    keep, blurred = (cut(photo, area((20, 30), (30, 70)), 0.25, False, how) for how in ("keep", "blur"))
    torch.testing.assert_close(blurred[:10], alignment.blur(keep, 0.05 * 60)[:10])  # by the longer side


@pytest.mark.parametrize("background, fill", [("keep", 0.5), ("white", 1.0), ("blur", 0.5)])
def test_a_square_beyond_the_picture_is_filled(background, fill):
    photo = torch.rand(60, 100, 3)
    square = cut(photo, area((10, 50), (5, 95)), 0.0, True, background)
    assert square.shape == (90, 90, 3) and (square[:15] == fill).all() and (square[75:] == fill).all()
    assert torch.equal(square[25:65], photo[10:50, 5:95])


def test_areas():
    mask, box = area((20, 30), (40, 60)), (50, 0, 100, 25)
    assert torch.equal(area_of(60, 100, mask, None), mask)
    assert torch.equal(area_of(60, 100, None, (40, 20, 20, 10)), mask)
    assert torch.equal(area_of(60, 100, mask, box), area((20, 25), (50, 60)))
    assert area_of(120, 200, mask, None).sum() == pytest.approx(4 * mask.sum().item(), rel=0.1)


@pytest.mark.parametrize(
    "mask, box, message",
    [
        (None, None, "Connect a mask of the subject, or give a box"),
        (torch.zeros(64, 64), None, "The mask is empty"),
        (None, (100, 0, 5, 5), r"outside the picture \(100 x 60"),
        (area((0, 5), (0, 5)), (50, 30, 9, 9), "where the mask is empty"),
    ],
)
def test_no_subject_is_an_error(mask, box, message):
    with pytest.raises(ValueError, match=message):
        area_of(60, 100, mask, box)


def test_batches():
    a, b = torch.rand(40, 40, 3), torch.rand(80, 60, 3)
    batch = as_batch([a, b], beyond=1.0)
    assert batch.shape == (2, 80, 60, 3) and torch.equal(batch[1], b)
    assert (batch[0, :10] == 1).all() and (batch[0, 70:] == 1).all()
    resized = common_upscale(a.movedim(-1, 0)[None], 60, 60, "bicubic", "disabled").clamp(0, 1)
    assert torch.equal(batch[0, 10:70], resized[0].movedim(0, -1))
    assert masks_of(None, 2) == [None, None]
    assert len(masks_of(torch.zeros(4, 5), 3)) == len(masks_of(torch.zeros(3, 4, 5), 3)) == 3
    with pytest.raises(ValueError, match="2 masks for 3 pictures"):
        masks_of(torch.zeros(2, 4, 5), 3)
