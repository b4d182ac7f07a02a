"""The workflows of the small model, run as they are: trained weights, real pictures."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from served import SMALL, WORKFLOWS, change, ids, pixels_of

from scripts.thumbnails import STAND_INS, made_photos, with_small_model
from scripts.workflow import read_graph, to_prompt


@pytest.fixture
def quickstart(studio):
    """Its prompt, for a test to change."""
    return studio.prompt("quickstart")


@pytest.fixture(scope="module")
def drawn(studio):
    """What the quickstart draws."""
    return [pixels_of(png) for png in studio.client.run(studio.prompt("quickstart"))]


@pytest.mark.parametrize("name", [name for name in SMALL if name != "quickstart"])
def test_it_runs_and_saves_pictures_with_something_in_them(studio, name):
    prompt = studio.prompt(name)
    pictures = [pixels_of(png) for png in studio.client.run(prompt)]
    assert len(pictures) == len(ids(prompt, "SaveImage"))
    assert all(picture.std() > 10 for picture in pictures)


def test_the_subject_is_drawn_and_its_word_alone_is_not(studio, quickstart, drawn):
    assert len(drawn) == 3
    for number in range(len(ids(quickstart, "NestedAttentionApplySubject"))):
        change(quickstart, "NestedAttentionApplySubject", number, strength=0.0)
    plain = [pixels_of(png) for png in studio.client.run(quickstart)]
    assert all(difference(a, b) > 6 for a, b in zip(drawn, plain, strict=True))


@pytest.mark.parametrize("name", [name for name in STAND_INS if name not in ("save_subject", "load_subject")])
def test_workflows_of_other_models_draw_the_photo_too(studio, name, tmp_path):
    """Their wiring, with the small model for checkpoint and image encoder, as for their thumbnails."""
    for photo in made_photos(tmp_path):
        studio.client.upload_image(photo)
    prompt = with_small_model(to_prompt(read_graph(WORKFLOWS[name]), studio.info), *STAND_INS[name])
    [drawn] = [pixels_of(png) for png in studio.client.run(prompt)]
    for number in range(len(ids(prompt, "NestedAttentionApplySubject"))):
        change(prompt, "NestedAttentionApplySubject", number, strength=0.0)
    [plain] = [pixels_of(png) for png in studio.client.run(prompt)]
    assert difference(drawn, plain) > 6


def test_another_photo_is_another_person(studio, quickstart, drawn):
    photo = quickstart[ids(quickstart, "LoadImage")[0]]["inputs"]["image"]
    change(quickstart, "LoadImage", image="studio_person_2.png")
    other = [pixels_of(png) for png in studio.client.run(quickstart)]
    assert all(difference(a, b) > 6 for a, b in zip(drawn, other, strict=True))
    change(quickstart, "LoadImage", image=photo)
    again = [pixels_of(png) for png in studio.client.run(quickstart)]
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))


def test_each_of_two_people_is_drawn_in_the_own_place(studio):
    """Anna left, Bob right: without Bob's photo it is his side that is another."""
    prompt = studio.prompt("two_people")
    [drawn] = [pixels_of(png) for png in studio.client.run(prompt)]
    change(prompt, "NestedAttentionApplySubject", 1, strength=0.0)
    [alone] = [pixels_of(png) for png in studio.client.run(prompt)]
    middle = drawn.shape[1] // 2
    left, right = (difference(drawn[:, side], alone[:, side]) for side in (slice(middle), slice(middle, None)))
    assert right > 8 and right > 3 * left, (left, right)


def test_a_picture_carries_its_workflow(studio, quickstart):
    """So that it can be dropped on the canvas."""
    change(quickstart, "KSampler", seed=5)
    png = studio.client.run(quickstart)[0]
    assert "NestedAttentionApplySubject" in Image.open(io.BytesIO(png)).info["prompt"]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean, of 0 to 255."""
    return float(np.abs(a.astype(float) - b).mean())
